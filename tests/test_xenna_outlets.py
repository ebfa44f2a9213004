"""Where the hook's rows go, what happens when they cannot, and what it costs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from cosmos_xenna.pipelines.private import monitoring
from wandb_file import read_run
from xenna_cases import (
    ORIGINAL,
    Monitored,
    make_hook,
    no_cluster,
    read_records,
    run_to_the_end,
)

import raywb.xenna.outlets
from raywb.errors import SettingsError
from raywb.xenna import (
    XennaObservabilityConfig,
    XennaWandbStatsHook,
    make_xenna_wandb_stats_hook,
)

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


def test_errors_of_the_hook_are_counted_and_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that cannot be read costs one row, and later rows say that there was one."""
    broken = [True, True, False]

    def make_stats(
        self: Any, input_len: int, ext_output_lens: list[int], task_metadata_per_pool: list[Any]
    ) -> Any:
        stats = ORIGINAL(self, input_len, ext_output_lens, task_metadata_per_pool)
        return "no statistics" if broken.pop(0) else stats

    with monkeypatch.context() as patch:
        patch.setattr(monitoring.PipelineMonitor, "_make_stats", make_stats)
        with make_hook(path) as hook:
            pipeline = Monitored("A", num_inputs=4)
            assert pipeline.snapshot(4) == "no statistics"
            pipeline.snapshot(4)
            pipeline.snapshot(4)
            pipeline.finish_tasks(0, 4)
    assert [record["metrics"]["hook_errors"] for record in read_records(path)] == [2, 2]
    assert hook.hook_errors == 2
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "reading a snapshot failed" in warning.getMessage()
    assert warning.exc_info is not None


def test_an_interrupt_in_the_middle_of_the_hook_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C belongs to the pipeline's owner, wherever it strikes."""

    class Interrupting:
        @property
        def start_time(self) -> float:
            raise KeyboardInterrupt

    def make_stats(
        self: Any, input_len: int, ext_output_lens: list[int], task_metadata_per_pool: list[Any]
    ) -> Any:
        return Interrupting()

    with monkeypatch.context() as patch:
        patch.setattr(monitoring.PipelineMonitor, "_make_stats", make_stats)
        with pytest.raises(KeyboardInterrupt), make_hook():
            Monitored("A", num_inputs=1).snapshot(1)


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """Each record that is lost is counted."""
    (tmp_path / "file").write_text("not a directory")
    with make_hook(tmp_path / "file" / "stats.jsonl") as hook:
        run_to_the_end(Monitored("A", num_inputs=4))
    assert hook.hook_errors == 2


def test_a_file_that_hangs_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody reads blocks its writer; the end of the hook waits for a set time."""
    monkeypatch.setattr(raywb.xenna.outlets, "DRAIN_TIMEOUT_S", 0.2)
    pipe = tmp_path / "stats.jsonl"
    os.mkfifo(pipe)
    start = time.monotonic()
    with make_hook(pipe) as hook:
        run_to_the_end(Monitored("A", num_inputs=4))
    assert time.monotonic() - start < 5
    assert hook.hook_errors == 1
    with pipe.open() as reader:  # which lets the writer go on, and end
        assert len(reader.readlines()) == 2


def test_numbers_that_json_does_not_have_become_null(path: Path) -> None:
    """Every line is JSON in the strict sense."""
    with make_hook(path):
        pipeline = Monitored("A", num_inputs=1)
        pipeline.monitor._rate_estimator.get_rate = lambda: float("nan")
        pipeline.snapshot(1)
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        record = json.loads(line, parse_constant=pytest.fail)
        assert record["metrics"]["main_loop_rate_hz"] is None


def test_another_interval_than_the_configured_one_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The pipeline's own interval decides, so a hook that expects another one says so."""
    with make_hook(interval_s=30):
        for interval_s in (30, 60, 90):
            Monitored("A", num_inputs=1, interval_s=interval_s).snapshot(1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "every 60 s" in line
    assert "PipelineConfig.logging_interval_s=30" in line


def test_wandb_that_is_not_there_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Wanted, but neither service nor run: a warning says what to do, and nothing is an error."""
    hook = make_hook(wandb=True)
    for _ in range(2):
        with hook:
            run_to_the_end(Monitored("A", num_inputs=1))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "raywb.start()" in line
    assert hook.hook_errors == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pipeline_logging_interval_s": 0}, "pipeline_logging_interval_s is 0; allowed is"),
        ({"pipeline_logging_interval_s": 1.5}, "pipeline_logging_interval_s is 1.5; allowed is"),
        ({"pipeline_logging_interval_s": True}, "pipeline_logging_interval_s is True; allowed is"),
        ({"wandb_log_pipeline_stats": "yes"}, "wandb_log_pipeline_stats is 'yes'; allowed is"),
        ({"pipeline_stats_jsonl_path": ""}, "pipeline_stats_jsonl_path is ''; allowed is"),
        ({"pipeline_stats_jsonl_path": 7}, "pipeline_stats_jsonl_path is 7; allowed is"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, Any], message: str) -> None:
    """The error says which key, which value, and what is allowed."""
    with pytest.raises(SettingsError, match=message):
        XennaObservabilityConfig(**values)


def test_the_config_has_exactly_the_fields_of_a_recipes_section() -> None:
    """Three fields with the defaults of the specification, which cannot be changed afterwards."""
    config = XennaObservabilityConfig()
    assert {name: getattr(config, name) for name in config.__dataclass_fields__} == {
        "wandb_log_pipeline_stats": True,
        "pipeline_logging_interval_s": 30,
        "pipeline_stats_jsonl_path": None,
    }
    with pytest.raises(AttributeError):
        config.pipeline_logging_interval_s = 1  # type: ignore[misc]


def test_no_output_no_hook() -> None:
    """There is a hook for either output, and none where neither is asked for."""

    def make(*, wandb: bool, path: str | None) -> XennaWandbStatsHook | None:
        config = XennaObservabilityConfig(
            wandb_log_pipeline_stats=wandb, pipeline_stats_jsonl_path=path
        )
        return make_xenna_wandb_stats_hook(observability=config, pipeline_kind="sft")

    assert make(wandb=False, path=None) is None
    assert isinstance(make(wandb=True, path=None), XennaWandbStatsHook)
    assert isinstance(make(wandb=False, path="x"), XennaWandbStatsHook)
    for kind in ("", "/", "a*", "a\n"):
        with pytest.raises(SettingsError, match="pipeline_kind"):
            make_hook(pipeline_kind=kind)


def test_a_relative_path_belongs_to_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, without one, to the directory in which the hook was made."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    hooks = [make_hook(Path("a.jsonl"), run_dir=tmp_path / "run"), make_hook(Path("b.jsonl"))]
    monkeypatch.chdir(tmp_path / "elsewhere")
    for hook in hooks:
        with hook:
            run_to_the_end(Monitored("A", num_inputs=1))
    assert (tmp_path / "run" / "a.jsonl").exists()
    assert (tmp_path / "b.jsonl").exists()


def test_without_a_service_rows_go_to_the_wandb_run_of_this_process(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipelines get their own names and axes, and nested hooks write each row once."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="p", dir=tmp_path, settings=wandb.Settings(console="off"))
    try:
        outer = make_hook(path, wandb=True, run_hash="abc", dataset_names=["one", "two"])
        inner = make_hook(wandb=True, pipeline_kind="inner")
        with outer, inner:
            run_to_the_end(Monitored("PlanStage", num_inputs=3))
            second = Monitored("DownloadStage", "PlanStage", num_inputs=4)
            second.snapshot(4)
            second.finish_tasks(0, 4)
            second.finish_tasks(1, 4, busy_s=7)
            second.stop()
        with pytest.raises(ValueError, match="bad"), make_hook(wandb=True):
            raise ValueError("bad")
    finally:
        run.finish()
        wandb.teardown()  # only the end of W&B's own process brings an offline run to the disk
    assert outer.hook_errors == inner.hook_errors == 0
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = read_run(file)
    rows = [
        {key: value for key, value in row.items() if not key.startswith("_")}
        for row in found.history
    ]
    prefixes = ["xenna/"] * 2 + ["xenna/pretrain_2/"] * 2 + ["xenna/pretrain_3/"]
    records = read_records(path)
    for record in records:
        record["metrics"].pop("bottleneck_stage", None)
    for row, prefix, record in zip(rows, prefixes, records, strict=False):
        assert row == {prefix + key: value for key, value in record["metrics"].items()}
    assert len(rows) == 5
    assert set(rows[4]) == {
        f"xenna/pretrain_3/{key}"
        for key in ("pipeline_duration_s", "error_type", "error_message", "hook_errors")
    }
    axis = found.metrics["xenna/*"].step_metric
    assert axis == "xenna/pipeline_duration_s"
    # By its full name, because `xenna/*` matches it, too.
    axis = found.metrics["xenna/pretrain_2/num_outputs"].step_metric
    assert axis == "xenna/pretrain_2/pipeline_duration_s"
    summary = found.summary
    assert summary["xenna/bottleneck_stage"] == "plan_stage"
    assert summary["xenna/pretrain_2/bottleneck_stage"] == "plan_stage"
    assert summary["xenna/run_hash"] == "abc"
    assert summary["xenna/dataset_names"] == "one, two"
    assert summary["xenna/progress"] == 100


def test_the_cost_of_a_snapshot_is_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what the hook adds to xenna's own call, for a pipeline of ten stages."""
    names = [f"Number{index}Stage" for index in range(10)]

    def measure(take: Callable[[], object]) -> float:
        times = []
        for _ in range(300):
            start = time.perf_counter()
            take()
            times.append(time.perf_counter() - start)
        return sorted(times)[150] * 1e6

    pipeline = Monitored(*names, num_inputs=1000)
    without = measure(lambda: pipeline.snapshot(500))
    with make_hook(path):
        observed = Monitored(*names, num_inputs=1000)
        with_hook = measure(lambda: observed.snapshot(500))
    with capsys.disabled():
        print(f"\nxenna hook: {with_hook - without:.0f} µs per snapshot of 10 stages (median)")
    assert len(read_records(path)) == 301
