"""What one snapshot of a xenna pipeline says, as plain numbers: no Ray, no xenna, no state.

Everything here reads xenna's objects by the names of their attributes, so it works with each xenna
that has them. Tasks are what actors are given; samples are what a pipeline's inputs and outputs
are counted in. A stage of batch size *b* takes up to *b* samples per task.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Metrics = dict[str, float | int | str]

#: Bytes in the GB of every `…_mem_gb` and `mem_gb`.
BYTES_PER_GB = 1e9
#: Exceptions around the stage's own one that are opened at most.
MAX_WRAPPERS = 8
#: Characters of an error message that are kept: its beginning and its end, which name the cause.
MAX_MESSAGE_CHARS = 2_000

_POOL_PREFIX = re.compile(r"^Stage \d+ - ")
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NOT_A_WORD = re.compile(r"[^0-9a-z]+")
_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FAILED_ACTOR = re.compile(r"\brepr=([^)\n]+)\)")


def class_name(pool_name: str) -> str:
    """Return the stage's class name: `Stage 02 - PlanStage` gives `PlanStage`."""
    return _POOL_PREFIX.sub("", pool_name)


def stage_keys(pool_names: Iterable[str]) -> tuple[str, ...]:
    """Return each stage's name in metric keys: its class in snake case, the second of one as `…_2`.

    `Stage 02 - BinIdxTokenizationStage` gives `bin_idx_tokenization_stage`.
    """
    keys: list[str] = []
    for pool_name in pool_names:
        words = _WORD_START.sub("_", class_name(pool_name)).lower()
        base = _NOT_A_WORD.sub("_", words).strip("_") or "stage"
        key, number = base, 1
        while key in keys:
            number += 1
            key = f"{base}_{number}"
        keys.append(key)
    return tuple(keys)


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage has done, and what it holds.

    Attributes:
        batch_size: Samples per task, at most.
        tasks_completed: Tasks that came back, with or without a result.
        tasks_lost: Tasks that xenna gave up on because their actors kept dying.
        samples_out: Samples that it handed on, or, for the last stage, that left the pipeline.
        tasks_queued: Tasks that wait in the stage for a free slot.
        samples_waiting: Results that wait behind the stage for the next one.
        slots_used: Slots of ready actors that hold a task.
        slots_empty: Slots of ready actors that do not.
        actors_ready: Actors that can work.
        actors_pending: Actors that are being set up.
        speed_tasks_per_s: Tasks per second of one actor (median), None while unknown.
    """

    batch_size: int
    tasks_completed: int
    tasks_lost: int
    samples_out: int
    tasks_queued: int
    samples_waiting: int
    slots_used: int
    slots_empty: int
    actors_ready: int
    actors_pending: int
    speed_tasks_per_s: float | None

    @property
    def samples_done(self) -> int:
        """Samples that the stage is finished with; up to a batch too many after a short batch."""
        return (self.tasks_completed + self.tasks_lost) * self.batch_size

    @property
    def samples_taken(self) -> int:
        """Samples that the stage has taken in: finished, in a slot, or queued in it."""
        return self.samples_done + (self.tasks_queued + self.slots_used) * self.batch_size

    @property
    def is_stopped(self) -> bool:
        """Whether the stage has no actor and no task: not started yet, or ended."""
        busy = self.actors_ready + self.actors_pending + self.slots_used + self.tasks_queued
        return busy == 0


def read_stage(
    pool_stats: Any,
    *,
    samples_in: int,
    batch_size: int = 1,
    samples_out: int | None = None,
    tasks_lost: int = 0,
) -> Stage:
    """Read a stage from xenna's `ActorPoolStats`.

    Args:
        pool_stats: xenna's counters of the stage.
        samples_in: Samples that the stage before it handed on.
        batch_size: The stage's batch size.
        samples_out: Samples handed on, where they were counted. Else they are estimated from
            xenna's counters, in which a task that returned fewer samples than it took cannot be
            told from one that returned as many.
        tasks_lost: Tasks that xenna gave up on.
    """
    tasks, slots, actors = pool_stats.task_stats, pool_stats.slot_stats, pool_stats.actor_stats
    if samples_out is None:
        # A last batch may be short, so no more went in than the stage before handed on.
        done = min(tasks.total_completed * batch_size, max(samples_in, tasks.total_completed))
        dropped = tasks.total_returned_none * batch_size
        samples_out = max(0, done - dropped + tasks.total_dynamically_spawned)
    return Stage(
        batch_size=batch_size,
        tasks_completed=tasks.total_completed,
        tasks_lost=tasks_lost,
        samples_out=samples_out,
        tasks_queued=tasks.input_queue_size,
        samples_waiting=tasks.output_queue_size,
        slots_used=slots.num_used,
        slots_empty=slots.num_empty,
        actors_ready=actors.ready,
        actors_pending=actors.pending,
        speed_tasks_per_s=pool_stats.processing_speed_tasks_per_second,
    )


def completed_shares(stages: Sequence[Stage], num_inputs: int) -> list[float]:
    """Return for each stage which share (0–1) of its work in the whole pipeline is done.

    A stage's share is the share of the stage before it, times how much of what that one handed on
    it has finished. So a stage that fans out tenfold gives the next one ten times the tasks, each
    worth a tenth, as in xenna's own `pipeline_progress` gauge; one that drops half gives it half
    the tasks, each worth double; and one that has handed on nothing leaves nothing to do.
    """
    shares: list[float] = []
    share, offered = (1.0 if num_inputs > 0 else 0.0), num_inputs
    for stage in stages:
        if offered > 0:
            share *= min(1.0, stage.samples_done / offered)
        shares.append(share)
        offered = stage.samples_out
    return shares


def is_complete(stages: Sequence[Stage], num_inputs: int) -> bool:
    """Return whether every stage has finished all that the stage before it handed on."""
    offered = num_inputs
    for stage in stages:
        if stage.samples_done < offered or stage.slots_used or stage.tasks_queued:
            return False
        offered = stage.samples_out
    return bool(stages) and num_inputs > 0


def find_bottleneck(stages: Sequence[Stage], inputs_waiting: int) -> int | None:
    """Return the index of the stage that holds the pipeline up, or None while nothing shows it.

    The first rule that finds a stage decides:

    1. The stage furthest downstream that has no empty slot while a batch waits for it. What lies
       behind it starves; what is in front of it is held back by it, so the furthest one counts.
       A stage whose actors are still being set up has no empty slot either.
    2. The stage furthest downstream whose slots are all in use.
    3. The stage of the lowest capacity: samples per second of all its ready actors, counted in
       inputs of the pipeline.

    Before any stage has a ready actor, nothing can be told.
    """
    if not any(stage.actors_ready for stage in stages):
        return None
    waiting = [inputs_waiting, *(stage.samples_waiting for stage in stages)]
    indices = range(len(stages) - 1, -1, -1)
    for index in indices:
        stage = stages[index]
        has_input = stage.tasks_queued > 0 or waiting[index] >= stage.batch_size
        if stage.slots_empty == 0 and has_input:
            return index
    for index in indices:
        if stages[index].slots_used > 0 and stages[index].slots_empty == 0:
            return index
    capacities = _capacities_inputs_per_s(stages)
    return min(capacities, key=lambda index: capacities[index]) if capacities else None


def _capacities_inputs_per_s(stages: Sequence[Stage]) -> dict[int, float]:
    """Return by index what each stage could do, in inputs of the pipeline per second."""
    capacities: dict[int, float] = {}
    inputs_per_sample = 1.0
    for index, stage in enumerate(stages):
        if stage.speed_tasks_per_s is not None and stage.actors_ready:
            samples_per_s = stage.speed_tasks_per_s * stage.actors_ready * stage.batch_size
            capacities[index] = samples_per_s * inputs_per_sample
        if not stage.samples_out:
            break  # what a sample of the stages behind it is worth is not known yet
        inputs_per_sample *= stage.samples_done / stage.samples_out
    return capacities


def flatten(stats: Any, keys: Sequence[str] | None = None) -> Metrics:
    """Return what xenna's `PipelineStats` says of cluster and stages, as metrics without prefix.

    `actors_target` is ready + pending where xenna says 0, which up to 0.5 it always does.
    A stage without actors has no resource usage, so its resource metrics are 0.
    """
    if keys is None:
        keys = stage_keys(pool.name for pool in stats.actor_pools)
    row: Metrics = {
        "pipeline_duration_s": float(stats.pipeline_duration_s),
        "main_loop_rate_hz": float(stats.main_loop_rate_hz),
    }
    for label, pooled in (("total", stats.cluster.total), ("avail", stats.cluster.available)):
        row[f"cluster/{label}_cpus"] = float(pooled.num_cpus)
        row[f"cluster/{label}_gpus"] = float(pooled.num_gpus)
        row[f"cluster/{label}_mem_gb"] = float(pooled.memory) / BYTES_PER_GB
    for key, pool in zip(keys, stats.actor_pools, strict=True):
        usage = stats.resource_usage_per_stage.get(pool.name)
        _add_stage(row, f"stage/{key}/", pool)
        prefix = f"stage/{key}/resource/"
        row[f"{prefix}cpu_util_pct"] = float(usage.cpu_utilization) if usage else 0.0
        row[f"{prefix}mem_gb"] = float(usage.memory_usage) / BYTES_PER_GB if usage else 0.0
        row[f"{prefix}actor_count"] = int(usage.actor_count) if usage else 0
    return row


def _add_stage(row: Metrics, prefix: str, pool: Any) -> None:
    actors, tasks, slots = pool.actor_stats, pool.task_stats, pool.slot_stats
    row[f"{prefix}actors_target"] = int(actors.target or actors.ready + actors.pending)
    row[f"{prefix}actors_ready"] = int(actors.ready)
    row[f"{prefix}actors_running"] = int(actors.running)
    row[f"{prefix}actors_idle"] = int(actors.idle)
    row[f"{prefix}actors_pending"] = int(actors.pending)
    row[f"{prefix}tasks_completed"] = int(tasks.total_completed)
    row[f"{prefix}tasks_returned_none"] = int(tasks.total_returned_none)
    row[f"{prefix}queue_in"] = int(tasks.input_queue_size)
    row[f"{prefix}queue_out"] = int(tasks.output_queue_size)
    row[f"{prefix}slots_used"] = int(slots.num_used)
    row[f"{prefix}slots_empty"] = int(slots.num_empty)
    if pool.processing_speed_tasks_per_second is not None:
        row[f"{prefix}speed_tasks_per_s"] = float(pool.processing_speed_tasks_per_second)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a pipeline failed: the exception's type, its message, and the stage's metric name."""

    type: str
    message: str
    stage: str | None

    def as_metrics(self) -> Metrics:
        """Return the failure as metrics; the stage is left out where it is not known."""
        row: Metrics = {"error_type": self.type, "error_message": self.message}
        if self.stage is not None:
            row["error_stage"] = self.stage
        return row


def describe_failure(error: BaseException, stages: Mapping[str, str] | None = None) -> Failure:
    """Describe an exception that ended a pipeline.

    Ray wraps what a stage raised: the type and message are those of the stage's own exception.

    Args:
        error: The exception.
        stages: The metric name of a stage by each text that tells of it: the name of its pool,
            and the ids of its actors.
    """
    cause = error
    for _ in range(MAX_WRAPPERS):
        inner = getattr(cause, "cause", None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    message = _TERMINAL_COLOUR.sub("", str(cause))
    if len(message) > MAX_MESSAGE_CHARS:
        half = MAX_MESSAGE_CHARS // 2
        message = f"{message[:half]} … {message[-half:]}"
    return Failure(type(cause).__name__, message, _failed_stage(error, stages or {}))


def _failed_stage(error: BaseException, stages: Mapping[str, str]) -> str | None:
    """Return the metric name of the stage that an exception, or one that led to it, tells of.

    Ray names the actor that raised (`repr=Stage 01 - PlanStage`), or gives the id of one that died;
    xenna names the stage in what it raises about set-up and about actors that keep dying.
    No stage is to blame for an interrupt.
    """
    if not isinstance(error, Exception):
        return None
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = str(link)
        for actor in _FAILED_ACTOR.findall(text):
            if actor in stages:
                return stages[actor]
        named = [(text.find(sign), key) for sign, key in stages.items()]
        found = [place for place in named if place[0] >= 0]
        if found:
            return min(found)[1]
        link = link.__cause__ or link.__context__
    return None
