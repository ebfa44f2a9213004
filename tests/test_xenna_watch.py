"""Several pipelines and several hooks, one after the other, nested and at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cosmos_xenna.pipelines.private import monitoring
from xenna_cases import (
    ORIGINAL,
    Monitored,
    make_hook,
    no_cluster,
    read_records,
    run_to_the_end,
)

from raywb.errors import RaywbError
from raywb.xenna import (
    XennaWandbStatsHook,
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


def test_nested_hooks_each_get_every_snapshot(path: Path) -> None:
    """Both files tell the same story, also of the failure."""
    outer, inner = path.with_name("outer.jsonl"), path.with_name("inner.jsonl")

    def run() -> None:
        pipeline = Monitored("A", num_inputs=4)
        pipeline.snapshot(4)
        pipeline.finish_tasks(0, 1)
        pipeline.snapshot(3)
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"), make_hook(outer), make_hook(inner):
        run()
    stories = [[record | {"timestamp": 0} for record in read_records(p)] for p in (outer, inner)]
    assert stories[0] == stories[1]
    assert len(stories[0]) == 3


def test_a_hook_that_ends_early_leaves_the_pipeline_to_the_others(path: Path) -> None:
    """A hook may end while a pipeline of another thread runs on; the other hook sees its end."""
    short, long = path.with_name("short.jsonl"), path.with_name("long.jsonl")
    half_done, may_end = threading.Event(), threading.Event()

    def run() -> None:
        pipeline = Monitored("A", num_inputs=4)
        pipeline.snapshot(4)
        pipeline.finish_tasks(0, 2)
        pipeline.queue_tasks(0, 1)
        half_done.set()
        may_end.wait()
        pipeline.pools[0]._task_queue.clear()
        pipeline.finish_tasks(0, 2)
        pipeline.stop()

    with make_hook(long):
        with make_hook(short):
            thread = threading.Thread(target=run)
            thread.start()
            half_done.wait()
        may_end.set()
        thread.join()
    assert [record["metrics"]["progress"] for record in read_records(short)] == [0, 50]
    assert [record["metrics"]["progress"] for record in read_records(long)] == [0, 100]


def test_an_error_is_that_of_the_pipeline_that_is_not_done(path: Path) -> None:
    """Of two pipelines in threads, the one that did all its work has no part in the exception."""

    both_begun = threading.Barrier(2)

    def work(name: str, done: int) -> None:
        pipeline = Monitored(name, num_inputs=2)
        pipeline.snapshot(2)
        both_begun.wait()
        pipeline.finish_tasks(0, done)

    def run() -> None:
        threads = [
            threading.Thread(target=work, args=arguments)
            for arguments in (("Whole", 2), ("Half", 1))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"), make_hook(path):
        run()
    finals = [record for record in read_records(path) if record.get("final")]
    assert {record["stages"][0]: "error" in record for record in finals} == {
        "Whole": False,
        "Half": True,
    }


def test_pipelines_one_after_the_other_do_not_mix(path: Path) -> None:
    """Each has its own last row, at the latest when the next one begins."""
    with make_hook(path):
        for num_inputs in (3, 5):
            run_to_the_end(Monitored("A", num_inputs=num_inputs))
    records = read_records(path)
    assert [record.get("final", False) for record in records] == [False, True, False, True]
    assert [record["metrics"]["num_outputs"] for record in records] == [0, 3, 0, 5]


def test_pipelines_in_threads_at_once_do_not_mix(path: Path) -> None:
    """Snapshots of several monitors that come in turns are told apart by their monitor."""
    turns = threading.Barrier(3)

    def run(name: str, num_inputs: int) -> None:
        pipeline = Monitored(name, num_inputs=num_inputs)
        for done in range(num_inputs):
            turns.wait()
            pipeline.snapshot(num_inputs - done)
            pipeline.finish_tasks(0, 1)
        pipeline.stop()
        for _ in range(12 - num_inputs):
            turns.wait()

    with make_hook(path):
        threads = [
            threading.Thread(target=run, args=(name, num_inputs))
            for name, num_inputs in (("Four", 4), ("Eight", 8), ("Twelve", 12))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, num_inputs in (("Four", 4), ("Eight", 8), ("Twelve", 12)):
        mine = [record for record in read_records(path) if record["stages"] == [name]]
        outputs = [record["metrics"]["num_outputs"] for record in mine]
        assert outputs == list(range(num_inputs + 1))
        assert [record.get("final", False) for record in mine] == [False] * num_inputs + [True]


def test_a_hook_can_be_used_again_but_not_twice_at_once(path: Path) -> None:
    """A second entry would count everything twice, so it is refused, and changes nothing."""
    hook = make_hook(path)
    for _ in range(2):
        with hook:
            with pytest.raises(RaywbError, match="entered already"):
                hook.__enter__()
            run_to_the_end(Monitored("A", num_inputs=2))
    assert [record.get("final", False) for record in read_records(path)] == [False, True] * 2


def test_progress_can_be_asked_for_by_any_thread(path: Path) -> None:
    """Per stage: tasks done and tasks to expect, which later stages have once the first works."""
    with make_hook(path) as hook:
        assert hook.progress() is None
        pipeline = Monitored("Split", "Pack", num_inputs=10, batch_sizes=[1, 4])
        pipeline.snapshot(10)
        assert _told(hook) == [("split", 0, 10), ("pack", 0, None)]
        pipeline.finish_tasks(0, 5, returns=2)
        pipeline.finish_tasks(1, 1, returns=1)
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(_told(hook)))
        thread.start()
        thread.join()
        assert answers == [[("split", 5, 10), ("pack", 1, 5)]]
        pipeline.finish_tasks(0, 5, returns=2)
        pipeline.finish_tasks(1, 4, returns=1)
        pipeline.stop()
    assert _told(hook) == [("split", 10, 10), ("pack", 5, 5)]


def _told(hook: XennaWandbStatsHook) -> list[tuple[str, int, int | None]]:
    return [(s.stage, s.tasks_completed, s.tasks_expected) for s in hook.progress() or []]
