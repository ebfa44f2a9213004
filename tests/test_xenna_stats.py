"""A snapshot of xenna becomes the metrics that SPEC D names, with the numbers that are true."""

from __future__ import annotations

from typing import Any

import pytest
from cosmos_xenna.pipelines.private.monitoring_types import (
    PipelineStats,
    RayClusterInfo,
    RayStageResourceUsage,
    Resources,
)
from cosmos_xenna.ray_utils.monitoring import ActorPoolStats, ActorStats, SlotStats, TaskStats
from spec_metrics import STAGE_METRICS
from xenna_cases import Monitored, no_cluster

from raywb.xenna.stats import (
    MAX_MESSAGE_CHARS,
    Stage,
    class_name,
    completed_shares,
    describe_failure,
    find_bottleneck,
    flatten,
    is_complete,
    read_stage,
    stage_keys,
)

pytestmark = pytest.mark.xenna


def pool(name: str, *, speed: float | None = None, target: int = 0) -> ActorPoolStats:
    """Return xenna's counters of a stage in which every number is another one."""
    return ActorPoolStats(
        name,
        None,
        ActorStats(target=target, pending=1, ready=3, running=2, idle=4),
        TaskStats(
            total_completed=50,
            total_returned_none=5,
            total_dynamically_spawned=20,
            input_queue_size=6,
            output_queue_size=7,
        ),
        SlotStats(num_used=8, num_empty=9),
        speed,
        [],
        [],
        [],
        [],
    )


def stats(*pools: ActorPoolStats, usage: dict[str, RayStageResourceUsage]) -> PipelineStats:
    """Return a snapshot as xenna makes it."""
    return PipelineStats(
        start_time=100.0,
        time=112.0,
        num_initial_input_tasks=60,
        num_input_tasks_remaining=3,
        num_outputs=0,
        actor_pools=list(pools),
        pipeline_duration_s=11.5,
        main_loop_rate_hz=98,
        cluster=RayClusterInfo(
            Resources(8.0, 2.0, 64e9, 9e9), Resources(1.5, 0.5, 48e9, 9e9), actors=[]
        ),
        resource_usage_per_stage=usage,
        extra_data_per_stage={},
    )


def stage(**changes: Any) -> Stage:
    """Return an idle stage of one ready actor, with changes."""
    values: dict[str, Any] = {
        "batch_size": 1,
        "tasks_completed": 0,
        "tasks_lost": 0,
        "samples_out": 0,
        "tasks_queued": 0,
        "samples_waiting": 0,
        "slots_used": 0,
        "slots_empty": 2,
        "actors_ready": 1,
        "actors_pending": 0,
        "speed_tasks_per_s": None,
    }
    return Stage(**(values | changes))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Stage 02 - BinIdxTokenizationStage", "bin_idx_tokenization_stage"),
        ("Stage 00 - PlanStage", "plan_stage"),
        ("Stage 117 - HTTPDownloadStage", "http_download_stage"),
        ("Stage 01 - _Sha256Stage", "sha256_stage"),
        ("Stage 01 - PackedSFTParquet", "packed_sft_parquet"),
        ("Stage 01 - Wrapped[int]", "wrapped_int"),
        ("Stage 01 - 漢", "stage"),
        ("no number", "no_number"),
    ],
)
def test_a_stage_is_named_by_its_class_in_snake_case(name: str, key: str) -> None:
    """Metric keys carry the class name in snake case, whatever characters it has."""
    assert stage_keys([name]) == (key,)


def test_two_stages_of_one_class_are_told_apart() -> None:
    """The second stage of a class gets `_2`, and no made-up name takes another stage's own."""
    names = ["Stage 00 - Copy", "Stage 01 - Copy_2", "Stage 02 - Copy", "Stage 03 - Copy"]
    assert stage_keys(names) == ("copy", "copy_2", "copy_3", "copy_4")
    assert [class_name(name) for name in names] == ["Copy", "Copy_2", "Copy", "Copy"]


def test_a_snapshot_has_every_metric_of_cluster_and_stages() -> None:
    """The keys are those of the specification, and memory is in units of 1e9 bytes."""
    name = "Stage 00 - PlanStage"
    usage = {name: RayStageResourceUsage(name, 150.0, 3e9, 3)}
    row = flatten(stats(pool(name, speed=0.25, target=4), usage=usage))
    assert row == {
        "pipeline_duration_s": 11.5,
        "main_loop_rate_hz": 98.0,
        "cluster/total_cpus": 8.0,
        "cluster/total_gpus": 2.0,
        "cluster/total_mem_gb": 64.0,
        "cluster/avail_cpus": 1.5,
        "cluster/avail_gpus": 0.5,
        "cluster/avail_mem_gb": 48.0,
        "stage/plan_stage/actors_target": 4,
        "stage/plan_stage/actors_ready": 3,
        "stage/plan_stage/actors_running": 2,
        "stage/plan_stage/actors_idle": 4,
        "stage/plan_stage/actors_pending": 1,
        "stage/plan_stage/tasks_completed": 50,
        "stage/plan_stage/tasks_returned_none": 5,
        "stage/plan_stage/queue_in": 6,
        "stage/plan_stage/queue_out": 7,
        "stage/plan_stage/slots_used": 8,
        "stage/plan_stage/slots_empty": 9,
        "stage/plan_stage/speed_tasks_per_s": 0.25,
        "stage/plan_stage/resource/cpu_util_pct": 150.0,
        "stage/plan_stage/resource/mem_gb": 3.0,
        "stage/plan_stage/resource/actor_count": 3,
    }
    assert {type(value) for value in row.values()} <= {int, float}


def test_what_is_not_known_is_left_out_and_what_is_gone_is_zero() -> None:
    """An unknown speed has no key; a stage without processes uses nothing."""
    row = flatten(stats(pool("Stage 00 - PlanStage"), usage={}))
    keys = {key.removeprefix("stage/plan_stage/") for key in row if key.startswith("stage/")}
    assert keys == STAGE_METRICS
    assert row["stage/plan_stage/resource/cpu_util_pct"] == 0.0
    assert row["stage/plan_stage/resource/actor_count"] == 0


def test_the_actor_target_is_what_is_there_or_coming_where_xenna_says_nothing() -> None:
    """xenna always reports a target of 0, which would chart as if nothing were wanted."""
    row = flatten(stats(pool("Stage 00 - PlanStage"), usage={}))
    assert row["stage/plan_stage/actors_target"] == 3 + 1


def test_outputs_are_estimated_from_counters_where_they_were_not_counted() -> None:
    """Tasks without a result hand on nothing, and what was spawned comes on top."""
    assert read_stage(pool("Stage 00 - A"), samples_in=60).samples_out == 50 - 5 + 20
    batches = read_stage(pool("Stage 00 - A"), samples_in=198, batch_size=4)
    assert batches.samples_out == 198 - 5 * 4 + 20  # the last batch had two samples
    assert read_stage(pool("Stage 00 - A"), samples_in=60, samples_out=7).samples_out == 7


@pytest.mark.parametrize(
    ("stages", "shares"),
    [
        ([stage(tasks_completed=30, samples_out=30), stage(tasks_completed=10)], [0.5, 1 / 6]),
        # A fan-out of ten: 10 of 300 tasks are a sixtieth of what the first stage has done.
        ([stage(tasks_completed=30, samples_out=300), stage(tasks_completed=10)], [0.5, 1 / 60]),
        # Half is dropped, so each that is left counts double.
        ([stage(tasks_completed=30, samples_out=15), stage(tasks_completed=15)], [0.5, 0.5]),
        # All is dropped: nothing is left to do for the second stage.
        ([stage(tasks_completed=30, samples_out=0), stage()], [0.5, 0.5]),
        ([stage(tasks_completed=15, batch_size=2, samples_out=30), stage()], [0.5, 0.0]),
        ([stage(tasks_completed=9, batch_size=7, samples_out=60), stage()], [1.0, 0.0]),
        ([stage(tasks_completed=20, tasks_lost=10, samples_out=20), stage()], [0.5, 0.0]),
    ],
)
def test_a_stage_has_the_share_of_what_it_was_given(
    stages: list[Stage], shares: list[float]
) -> None:
    """Shares follow fan-out, drops, batches and lost tasks; the pipeline has 60 inputs."""
    assert completed_shares(stages, 60) == pytest.approx(shares)


def test_a_pipeline_without_inputs_has_done_nothing() -> None:
    """No division by zero, and no finished pipeline either."""
    assert completed_shares([stage(), stage()], 0) == [0.0, 0.0]
    assert not is_complete([stage()], 0)


def test_shares_are_those_of_xennas_own_gauge_where_that_is_defined() -> None:
    """Without drops and batches, their mean is what xenna itself charts as its progress."""

    class Gauge:
        value = 0.0

        def set(self, value: float) -> None:
            self.value = value

    with no_cluster():
        pipeline = Monitored("A", "B", "C", num_inputs=60)
        pipeline.finish_tasks(0, 50, returns=3)
        pipeline.finish_tasks(1, 70)
        pipeline.finish_tasks(2, 8, returns=2)
        snapshot = pipeline.snapshot(3)
        pipeline.monitor._metrics_pipeline_progress = gauge = Gauge()
        pipeline.monitor._update_ray_metrics(snapshot)
    stages: list[Stage] = []
    for counters in snapshot.actor_pools:
        samples_in = stages[-1].samples_out if stages else 60
        stages.append(read_stage(counters, samples_in=samples_in))
    assert sum(completed_shares(stages, 60)) / 3 == pytest.approx(gauge.value)
    assert 0 < gauge.value < 1


def test_all_is_done_when_no_stage_has_anything_left() -> None:
    """Every stage must have finished what the one before it handed on, and hold nothing."""
    done = [stage(tasks_completed=60, samples_out=20), stage(tasks_completed=20, samples_out=20)]
    assert is_complete(done, 60)
    assert not is_complete([done[0], stage(tasks_completed=19)], 60)
    assert not is_complete([stage(tasks_completed=59, samples_out=20), done[1]], 60)
    assert not is_complete([done[0], stage(tasks_completed=20, slots_used=1)], 60)
    short_last_batch = stage(batch_size=8, tasks_completed=8, samples_out=60)
    assert is_complete([short_last_batch], 60)


@pytest.mark.parametrize(
    ("stages", "inputs_waiting", "index"),
    [
        # Nothing can work yet.
        ([stage(actors_ready=0, slots_empty=0), stage(actors_ready=0, slots_empty=0)], 9, None),
        # The middle stage is full and has more waiting; the one behind it starves.
        ([stage(slots_used=2, slots_empty=0), stage(slots_used=2, slots_empty=0, tasks_queued=4),
          stage()], 9, 1),
        # The first stage is full and held back by the second, which is full, too.
        ([stage(slots_used=2, slots_empty=0, tasks_queued=8, samples_waiting=5),
          stage(slots_used=2, slots_empty=0)], 9, 1),
        # Only the first stage has something waiting.
        ([stage(slots_used=2, slots_empty=0), stage(slots_used=1, slots_empty=1)], 9, 0),
        # Less than a batch waits for the second stage, so it is not held up by itself.
        ([stage(slots_used=2, slots_empty=0, samples_waiting=3),
          stage(slots_used=2, slots_empty=0, batch_size=4)], 9, 0),
        # The second stage is still being set up, and its input piles up.
        ([stage(samples_waiting=6), stage(actors_ready=0, actors_pending=2, slots_empty=0)], 0, 1),
        # Nothing waits, but all slots of the second one are in use.
        ([stage(), stage(slots_used=2, slots_empty=0), stage(slots_used=1, slots_empty=1)], 0, 1),
        # All have room: the lowest capacity is 2 actors × 3 tasks/s.
        ([stage(speed_tasks_per_s=9.0, tasks_completed=9, samples_out=9),
          stage(speed_tasks_per_s=3.0, actors_ready=2)], 0, 1),
        # A fan-out of ten: 20 tasks/s behind it are 2 inputs/s.
        ([stage(speed_tasks_per_s=9.0, tasks_completed=9, samples_out=90),
          stage(speed_tasks_per_s=20.0)], 0, 1),
        # Batches of four: 3 tasks/s are 12 samples/s.
        ([stage(speed_tasks_per_s=9.0, tasks_completed=9, samples_out=9),
          stage(speed_tasks_per_s=3.0, batch_size=4)], 0, 0),
        # Nothing shows it.
        ([stage(), stage()], 0, None),
        ([], 0, None),
    ],
)  # fmt: skip
def test_the_bottleneck_is_named_from_queues_slots_and_speeds(
    stages: list[Stage], inputs_waiting: int, index: int | None
) -> None:
    """Each rule of `find_bottleneck` decides where the ones before it find nothing."""
    assert find_bottleneck(stages, inputs_waiting) == index


def test_a_failure_is_described_by_the_innermost_cause_and_the_stage_it_names() -> None:
    """xenna raises from Ray's error; the stage is found anywhere in the chain of exceptions."""
    names = ("Stage 00 - PlanStage", "Stage 01 - DownloadStage")
    signs = dict(zip(names, stage_keys(names), strict=True)) | {"0ed3ab4d01000000": "plan_stage"}
    try:
        try:
            raise OSError("\x1b[36mray::Worker.setup()\x1b[39m (repr=Stage 01 - DownloadStage)")
        except OSError as cause:
            raise RuntimeError("actor setup failed") from cause
    except RuntimeError as error:
        failure = describe_failure(error, signs)
    assert (failure.type, failure.message) == ("RuntimeError", "actor setup failed")
    assert failure.stage == "download_stage"
    for text in (
        f"Stage {names[0]} abandoned worker group",
        "actor_id: 0ed3ab4d01000000\n\tpid: 1",
    ):
        assert describe_failure(RuntimeError(text), signs).stage == "plan_stage"


def test_a_failure_that_names_no_stage_has_none() -> None:
    """No stage is guessed, and an interrupt is no stage's fault even if it came within one."""
    signs = {"Stage 00 - PlanStage": "plan_stage"}
    failure = describe_failure(ValueError("what"), signs)
    assert failure.as_metrics() == {"error_type": "ValueError", "error_message": "what"}
    interrupt = KeyboardInterrupt()
    interrupt.__context__ = ValueError("in Stage 00 - PlanStage")
    assert describe_failure(interrupt, signs).stage is None


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    """The end of a remote traceback names what happened, so it is the middle that goes."""
    failure = describe_failure(ValueError("begin" + "x" * 10 * MAX_MESSAGE_CHARS + "end"))
    assert len(failure.message) <= MAX_MESSAGE_CHARS + 3
    assert failure.message.startswith("begin")
    assert failure.message.endswith("end")
