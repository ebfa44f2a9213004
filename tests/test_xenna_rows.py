"""What the hook says of a pipeline is true, from its first row to its last."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from cosmos_xenna.pipelines.private import monitoring
from xenna_cases import (
    ORIGINAL,
    Monitored,
    final_metrics,
    make_hook,
    no_cluster,
    read_records,
    run_to_the_end,
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


def test_the_last_row_is_that_of_the_work_done(path: Path) -> None:
    """xenna takes no snapshot at the end; the hook takes it from the pools, and nothing is left."""
    with make_hook(path, run_hash="abc") as hook:
        pipeline = Monitored("PlanStage", "PlanStage", num_inputs=5)
        pipeline.snapshot(5)
        pipeline.finish_tasks(0, 3)
        pipeline.queue_tasks(0, 1)
        pipeline.snapshot(1)
        pipeline.finish_tasks(0, 2)
        pipeline.finish_tasks(1, 5, busy_s=9)
        pipeline.stop()
    first, middle, last = read_records(path)
    assert first["metrics"]["progress"] == 0
    assert first["metrics"]["num_input_remaining"] == 5
    assert middle["metrics"]["progress"] == pytest.approx(30)
    assert middle["metrics"]["num_input_remaining"] == 1
    assert "hook_errors" not in middle["metrics"]
    metrics = last["metrics"]
    assert last["final"] is True
    assert "error" not in last
    assert last["stages"] == ["PlanStage", "PlanStage"]
    assert (last["pipeline_kind"], last["run_hash"]) == ("pretrain", "abc")
    assert time.time() - 60 < last["timestamp"] <= time.time()
    assert metrics["progress"] == 100
    assert metrics["num_input_remaining"] == 0
    assert metrics["num_outputs"] == 5
    assert metrics["hook_errors"] == 0
    assert metrics["stage/plan_stage/tasks_completed"] == 5
    assert metrics["stage/plan_stage_2/tasks_completed"] == 5
    assert metrics["stage/plan_stage_2/resource/actor_count"] == 0
    assert metrics["cluster/avail_mem_gb"] == 6.0
    duration_s = metrics["pipeline_duration_s"]
    assert metrics["inputs_processed_per_s"] == pytest.approx(5 / duration_s)
    assert metrics["outputs_per_s"] == pytest.approx(5 / duration_s)
    # Nothing but the actors' own time shows the bottleneck of so short a pipeline.
    assert metrics["bottleneck_stage_index"] == 1
    assert metrics["bottleneck_stage"] == hook.bottleneck_stage == "plan_stage_2"


def test_the_bottleneck_of_a_pipeline_is_the_stage_with_the_most_work_per_actor(
    path: Path,
) -> None:
    """Twelve seconds of work are soon done by ten actors, two seconds by one are not."""
    with make_hook(path) as hook:
        pipeline = Monitored("Wide", "Narrow", num_inputs=2)
        pipeline.pools[0]._created_actor_count = 10
        pipeline.snapshot(2)
        pipeline.finish_tasks(0, 2, busy_s=6)
        pipeline.finish_tasks(1, 2, busy_s=1)
        pipeline.stop()
    assert hook.bottleneck_stage == "narrow"
    assert final_metrics(path)["bottleneck_stage_index"] == 1


def test_outputs_are_what_left_the_last_stage(path: Path) -> None:
    """Fan-out, dropped samples, failed tasks and packing are counted in samples."""
    with make_hook(path):
        pipeline = Monitored(
            "Split", "Filter", "Pack", num_inputs=10, batch_sizes=[1, 1, 4], interval_s=30
        )
        pipeline.snapshot(10)
        pipeline.finish_tasks(0, 8, returns=3)
        pipeline.finish_tasks(0, 2, returns=2, is_none=True)
        pipeline.finish_tasks(1, 14)
        pipeline.finish_tasks(1, 10, returns=0)
        pipeline.finish_tasks(2, 3, returns=1)
        pipeline.snapshot(0)
        pipeline.finish_tasks(2, 1, returns=1)  # the last two of 14
        pipeline.stop()
    _, middle, last = (record["metrics"] for record in read_records(path))
    assert middle["num_outputs"] == 3
    assert middle["progress"] == pytest.approx((100 + 100 + 100 * 12 / 14) / 3, abs=0.01)
    assert last["num_outputs"] == 4
    assert last["progress"] == 100
    assert last["stage/split/tasks_returned_none"] == 2


def test_pools_get_their_own_records_back(path: Path) -> None:
    """Counting does not keep xenna from its records, and leaves the pools as they were."""
    pipeline = Monitored("A", num_inputs=3)
    pool = pipeline.pools[0]
    capacity = pool.task_extra_data.maxlen
    with make_hook(path), make_hook():
        pipeline.snapshot(3)
        pipeline.finish_tasks(0, 2)
        stats = pipeline.snapshot(1)
        assert len(stats.extra_data_per_stage["Stage 00 - A"]) == 2
        pipeline.finish_tasks(0, 1)
        pipeline.stop()
    assert type(pool.task_extra_data) is deque
    assert pool.task_extra_data.maxlen == capacity
    assert len(pool.task_extra_data) == 1
    assert final_metrics(path)["num_outputs"] == 3


def test_records_of_an_unknown_shape_leave_xennas_own_counters(path: Path) -> None:
    """Where records cannot be counted, outputs are estimated, and xenna's loop goes on."""
    with make_hook(path) as hook:
        pipeline = Monitored("Split", num_inputs=4)
        pipeline.snapshot(4)
        pool = pipeline.pools[0]
        for _ in range(4):
            pool.task_extra_data.append(object())
            pool._num_completed_tasks += 1
            pool._num_dynamically_spawned_tasks += 2
        pipeline.stop()
    assert final_metrics(path)["num_outputs"] == 12
    assert final_metrics(path)["progress"] == 100
    assert hook.hook_errors == 0


def test_a_failure_leaves_the_state_at_failure(path: Path) -> None:
    """The last row has what was done, and type, message and stage of the error; nothing falls."""

    def run() -> None:
        pipeline = Monitored("PlanStage", "DownloadStage", num_inputs=40)
        pipeline.snapshot(40)
        pipeline.finish_tasks(0, 10)
        pipeline.queue_tasks(0, *[1] * 6)
        pipeline.queues[0] = 4
        pipeline.finish_tasks(1, 6)
        pipeline.snapshot(24)
        pipeline.finish_tasks(0, 2)
        pipeline.stop()  # as 0.5 does it, and with that it forgets what was queued
        raise RuntimeError("Stage Stage 01 - DownloadStage abandoned worker group 1")

    with pytest.raises(RuntimeError, match="abandoned"), make_hook(path):
        run()
    records = read_records(path)
    before, last = records[-2]["metrics"], records[-1]["metrics"]
    assert records[-1]["final"] is True
    assert records[-1]["error"] == {
        "type": "RuntimeError",
        "message": "Stage Stage 01 - DownloadStage abandoned worker group 1",
        "stage": "download_stage",
    }
    assert last["error_type"] == "RuntimeError"
    assert last["error_stage"] == "download_stage"
    assert last["num_input_remaining"] == 24
    assert last["num_outputs"] == 6
    assert last["stage/plan_stage/tasks_completed"] == 12
    assert last["stage/plan_stage/queue_out"] == 6
    assert before["progress"] <= last["progress"] < 100


def test_pools_that_were_not_stopped_tell_what_they_had_taken_in(path: Path) -> None:
    """xenna 0.3 leaves its pools alone when it fails: what is queued in them was taken in."""

    def run() -> None:
        pipeline = Monitored("PlanStage", num_inputs=40)
        pipeline.snapshot(40)
        pipeline.finish_tasks(0, 10)
        pipeline.queue_tasks(0, *[1] * 6)
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"), make_hook(path):
        run()
    metrics = final_metrics(path)
    assert metrics["num_input_remaining"] == 40 - 10 - 6
    assert metrics["stage/plan_stage/queue_in"] == 6
    assert metrics["progress"] == 25


def test_xennas_own_zeros_at_the_end_change_nothing(path: Path) -> None:
    """With a metrics port, xenna ends with a snapshot that says that no inputs are left."""

    def run() -> None:
        pipeline = Monitored("A", num_inputs=40)
        pipeline.snapshot(40)
        pipeline.finish_tasks(0, 10)
        pipeline.stop()
        pipeline.snapshot(0)
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"), make_hook(path):
        run()
    assert [r["metrics"]["num_input_remaining"] for r in read_records(path)] == [40, 30, 30]


def test_an_error_after_all_is_done_does_not_undo_it(path: Path) -> None:
    """The error is there, and so are 100 percent."""

    def run() -> None:
        run_to_the_end(Monitored("A", num_inputs=4))
        raise ValueError("later")

    with pytest.raises(ValueError, match="later"), make_hook(path):
        run()
    assert final_metrics(path)["progress"] == 100
    assert final_metrics(path)["error_type"] == "ValueError"


def test_a_failure_that_was_caught_inside_is_not_taken_for_success(path: Path) -> None:
    """Without an exception at the hook, the counters still say that work is left."""
    with make_hook(path):
        pipeline = Monitored("A", "B", num_inputs=4)
        pipeline.snapshot(4)
        pipeline.finish_tasks(0, 4)
        pipeline.finish_tasks(1, 1)
        pipeline.stop()
        run_to_the_end(Monitored("C", num_inputs=1))
    finals = [record for record in read_records(path) if record.get("final")]
    assert [final["metrics"]["progress"] for final in finals] == [62.5, 100]


def test_an_exception_without_a_pipeline_is_logged_alone(path: Path) -> None:
    """If nothing was ever seen, the error is the only thing to tell."""
    with pytest.raises(KeyboardInterrupt), make_hook(path):
        raise KeyboardInterrupt
    (record,) = read_records(path)
    assert record["final"] is True
    assert record["error"] == {"type": "KeyboardInterrupt", "message": "", "stage": None}
    assert record["stages"] == []
    metrics = record["metrics"]
    assert metrics["error_type"] == "KeyboardInterrupt"
    assert metrics["pipeline_duration_s"] >= 0


def test_a_plain_exit_is_no_failure(path: Path) -> None:
    """`sys.exit(0)` in the block ends well, `sys.exit(1)` does not."""

    def run(code: int) -> None:
        run_to_the_end(Monitored("A", num_inputs=1))
        sys.exit(code)

    for code in (0, 1):
        with pytest.raises(SystemExit), make_hook(path):
            run(code)
    assert ["error" in record for record in read_records(path)] == [False, False, False, True]


def test_progress_never_falls(path: Path) -> None:
    """When a stage begins to fan out, more is left than it seemed; the number stands still."""
    with make_hook(path):
        pipeline = Monitored("Split", "Work", num_inputs=4)
        pipeline.snapshot(4)
        pipeline.finish_tasks(0, 2)
        pipeline.finish_tasks(1, 2)
        pipeline.snapshot(2)
        pipeline.finish_tasks(0, 1, returns=98)
        pipeline.snapshot(1)
        pipeline.finish_tasks(0, 1)
        pipeline.finish_tasks(1, 99)
        pipeline.snapshot(0)
        pipeline.stop()
    progress = [record["metrics"]["progress"] for record in read_records(path)]
    assert progress == sorted(progress)
    assert progress[1:3] == [50, 50]
    assert progress[-2:] == [99.9, 100]


def test_batch_mode_counts_inputs_that_xenna_does_not(path: Path) -> None:
    """xenna goes on saying that all inputs remain, in tasks; the pools say how many samples do."""
    with make_hook(path):
        pipeline = Monitored("A", "B", num_inputs=3, batch_sizes=[4, 4])
        pipeline.queue_tasks(0, 4, 4, 2)
        pipeline.snapshot(3)
        pipeline.pools[0]._task_queue.popleft()
        pipeline.finish_tasks(0, 1, returns=4)
        pipeline.snapshot(3)
        pipeline.pools[0]._task_queue.clear()
        pipeline.finish_tasks(0, 1, returns=4)
        pipeline.finish_tasks(0, 1, returns=2)
        pipeline.pools[0].stop()
        pipeline.queue_tasks(1, 4, 4, 2)
        pipeline.snapshot(3)
        pipeline.pools[1]._task_queue.clear()
        pipeline.finish_tasks(1, 2, returns=4)
        pipeline.finish_tasks(1, 1, returns=2)
        pipeline.stop()
    rows = [record["metrics"] for record in read_records(path)]
    assert [row["num_input_remaining"] for row in rows] == [10, 6, 0, 0]
    assert [row["progress"] for row in rows] == [0, 20, 50, 100]
    assert [row["num_outputs"] for row in rows] == [0, 0, 0, 10]


def test_a_serving_pipeline_counts_what_arrives(path: Path) -> None:
    """Inputs that come later count as inputs; an end that drops some does not claim them done."""
    with make_hook(path):
        pipeline = Monitored("A", "B", num_inputs=0)
        pipeline.snapshot(0)
        pipeline.finish_tasks(0, 6)
        pipeline.finish_tasks(1, 4)
        pipeline.snapshot(2)
        pipeline.stop()
    rows = [record["metrics"] for record in read_records(path)]
    assert [row["num_input_remaining"] for row in rows] == [0, 2, 2]
    assert rows[1]["progress"] == rows[2]["progress"] == pytest.approx(100 * (6 + 4) / 16)
