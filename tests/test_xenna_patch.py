"""The one patch on xenna: there while a hook is active, restored after it, harmless in between."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from cosmos_xenna.pipelines.private import monitoring, specs
from cosmos_xenna.pipelines.private.monitoring_types import PipelineStats
from xenna_cases import (
    ORIGINAL,
    Monitored,
    make_hook,
    no_cluster,
    read_records,
    run_to_the_end,
)

from raywb.errors import RaywbError
from raywb.xenna import StageProgress

pytestmark = pytest.mark.xenna


@pytest.fixture(autouse=True)
def _without_cluster() -> Iterator[None]:
    """Let every test take snapshots without a cluster, and leave xenna as it was."""
    with no_cluster():
        yield
    assert monitoring.PipelineMonitor._make_stats is ORIGINAL


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a test's hook writes its records."""
    return tmp_path / "new" / "stats.jsonl"


def test_the_method_is_wrapped_while_a_hook_is_active(caplog: pytest.LogCaptureFixture) -> None:
    """The first hook wraps, nested ones do not, and the last one out restores the original."""
    caplog.set_level(logging.INFO, "raywb")
    with make_hook():
        wrapped = monitoring.PipelineMonitor._make_stats
        assert wrapped is not ORIGINAL
        assert inspect.signature(wrapped) == inspect.signature(ORIGINAL)
        with make_hook():
            assert monitoring.PipelineMonitor._make_stats is wrapped
        assert monitoring.PipelineMonitor._make_stats is wrapped
    assert monitoring.PipelineMonitor._make_stats is ORIGINAL
    lines = [record.message for record in caplog.records]
    assert lines == ["Installed PipelineMonitor._make_stats patch"]


def test_hooks_that_end_in_another_order_restore_the_original() -> None:
    """Whichever hook is the last one, it restores."""
    first, second = make_hook(), make_hook()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert monitoring.PipelineMonitor._make_stats is not ORIGINAL
    second.__exit__(None, None, None)
    assert monitoring.PipelineMonitor._make_stats is ORIGINAL


def test_an_exception_restores_the_original_and_goes_on() -> None:
    """What the pipeline raised leaves the hook as the same object."""
    error = ValueError("of the pipeline")
    with pytest.raises(ValueError, match="of the pipeline") as caught, make_hook(), make_hook():
        raise error
    assert caught.value is error
    assert monitoring.PipelineMonitor._make_stats is ORIGINAL


def test_many_threads_that_enter_and_leave_restore_the_original(path: Path) -> None:
    """References are counted over threads, and each hook sees the pipelines of its own thread."""
    start = threading.Barrier(4)

    def enter_and_leave(index: int) -> None:
        start.wait()
        for number in range(20):
            with make_hook(path.with_name(f"{index}-{number}.jsonl")):
                run_to_the_end(Monitored(f"Of{index}", num_inputs=2))

    threads = [threading.Thread(target=enter_and_leave, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitoring.PipelineMonitor._make_stats is ORIGINAL
    files = list(path.parent.iterdir())
    assert len(files) == 80
    for file in files:
        (final,) = [record for record in read_records(file) if record.get("final")]
        assert final["metrics"]["progress"] == 100
        assert final["stages"] == [f"Of{file.name[0]}"]


def test_what_the_original_returns_is_returned_untouched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xenna gets the very object that its own method made, with nothing changed in it."""
    made: list[tuple[PipelineStats, dict[str, Any]]] = []

    def make_stats(
        self: Any, input_len: int, ext_output_lens: list[int], task_metadata_per_pool: list[Any]
    ) -> PipelineStats:
        stats = ORIGINAL(self, input_len, ext_output_lens, task_metadata_per_pool)
        made.append((stats, attrs.asdict(stats)))
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(monitoring.PipelineMonitor, "_make_stats", make_stats)
        with make_hook(path):
            pipeline = Monitored("A", "B", num_inputs=9)
            returned = pipeline.snapshot(9)
            pipeline.finish_tasks(0, 3)
        assert monitoring.PipelineMonitor._make_stats is make_stats
    ((stats, content),) = made
    assert returned is stats
    assert attrs.asdict(stats) == content


def test_what_the_original_raises_is_raised_untouched() -> None:
    """A monitor that cannot reach its nodes fails as it would without the hook."""
    error = ConnectionError("no nodes")

    class Unreachable:
        def update(self) -> None:
            raise error

    pipeline = Monitored("A", num_inputs=1)
    pipeline.monitor._nodes_resource_monitor = Unreachable()
    with make_hook() as hook, pytest.raises(ConnectionError) as caught:
        pipeline.snapshot(1)
    assert caught.value is error
    assert hook.hook_errors == 0


def test_somebody_elses_patch_on_top_is_left_alone(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays, the hook says so, and a later hook still sees each snapshot once."""
    with make_hook():
        below = monitoring.PipelineMonitor._make_stats

        def on_top(
            self: Any, input_len: int, ext_output_lens: list[int], task_metadata_per_pool: list[Any]
        ) -> PipelineStats:
            return below(self, input_len, ext_output_lens, task_metadata_per_pool)

        monitoring.PipelineMonitor._make_stats = on_top
    try:
        assert monitoring.PipelineMonitor._make_stats is on_top
        assert "patched by somebody else" in caplog.text
        with make_hook(path):
            run_to_the_end(Monitored("A", num_inputs=3))
        assert [bool(record.get("final")) for record in read_records(path)] == [False, True]
        assert monitoring.PipelineMonitor._make_stats is on_top
    finally:
        monitoring.PipelineMonitor._make_stats = ORIGINAL


def test_an_unknown_xenna_is_not_patched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other parameters than the known ones: a warning names xenna's version, nothing is wrapped."""

    def make_stats(self: Any, everything: Any) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr(monitoring.PipelineMonitor, "_make_stats", make_stats)
        with make_hook() as hook:
            assert monitoring.PipelineMonitor._make_stats is make_stats
    (line,) = [record.getMessage() for record in caplog.records]
    assert "'everything'" in line
    assert "cosmos-xenna 0." in line
    assert hook.progress() is None


def test_a_missing_xenna_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cosmos-xenna the entry fails and says what to install; the hook stays usable."""
    hook = make_hook()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cosmos_xenna.pipelines.private.specs", None)
        with pytest.raises(RaywbError, match="pip install cosmos-xenna"), hook:
            pass
    with hook:
        assert monitoring.PipelineMonitor._make_stats is not ORIGINAL


def test_xenna_is_imported_on_entry_only() -> None:
    """Importing the module, making a config and a hook need no xenna, Ray, wandb or torch."""
    code = (
        "import sys, raywb.xenna as x\n"
        "x.make_xenna_wandb_stats_hook("
        "observability=x.XennaObservabilityConfig(), pipeline_kind='k')\n"
        "print([m for m in ('cosmos_xenna', 'ray', 'wandb', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_xenna_that_calls_back_is_not_patched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `stats_callback` in `PipelineConfig` is used instead; two pipelines are told apart."""
    config_class = attrs.make_class(
        "PipelineConfig", {"stats_callback": attrs.field(default=None)}, (specs.PipelineConfig,)
    )
    with monkeypatch.context() as patch:
        patch.setattr(specs, "PipelineConfig", config_class)
        with make_hook(path) as hook:
            assert monitoring.PipelineMonitor._make_stats is ORIGINAL
            callback = config_class(stats_callback=hook.stats_callback).stats_callback
            for name in ("First", "Second"):
                pipeline = Monitored(name, num_inputs=4)
                callback(pipeline.snapshot(4))
                pipeline.finish_tasks(0, 3)
                callback(pipeline.snapshot(1))
    records = read_records(path)
    assert [record["stages"] for record in records] == [["First"]] * 3 + [["Second"]] * 3
    assert [record["metrics"]["progress"] for record in records] == [0, 75, 100, 0, 75, 100]
    assert [record.get("final", False) for record in records] == [False, False, True] * 2
    assert hook.progress() == [StageProgress("second", 3, None)]
    hook.stats_callback(pipeline.snapshot(0))
    assert len(read_records(path)) == 6
    assert hook.hook_errors == 0
    hook.stats_callback(None)
    assert hook.hook_errors == 1
