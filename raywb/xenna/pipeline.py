"""One running xenna pipeline: what is carried from one of its snapshots to the next.

A pipeline is known by its `PipelineMonitor`. xenna takes no snapshot at the end of a pipeline, but
the counters of its actor pools outlive the actors, so the last one is taken from them here.

What it takes in is counted by `intake`, what its stages hand on by `tally`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raywb.xenna.intake import Intake
from raywb.xenna.outlets import SharedSeries
from raywb.xenna.stats import (
    Failure,
    Metrics,
    Stage,
    class_name,
    completed_shares,
    find_bottleneck,
    flatten,
    is_complete,
    read_stage,
    stage_keys,
)
from raywb.xenna.tally import TaskTally

#: Percent that `progress` shows at most before the last snapshot of a pipeline that did it all.
MAX_UNFINISHED_PERCENT = 99.9
#: Attempts to read a pool that another thread is changing.
READ_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class StageProgress:
    """How far one stage is: its metric name, tasks done, and tasks expected (None: not known)."""

    stage: str
    tasks_completed: int
    tasks_expected: int | None


class Pipeline:
    """A pipeline from its first snapshot to its last.

    Attributes:
        started_at: Unix time of its beginning.
        keys: The stages' names in metrics.
        class_names: The stages' classes.
        row: The newest metrics, None before the first snapshot.
        number: How many rows there have been.
        series: Where the rows go in W&B.
        is_concluded: Whether `row` is the last one.
    """

    def __init__(self, stats: Any, thread_id: int, monitor: Any | None = None) -> None:
        self.thread_id = thread_id
        self.started_at = float(stats.start_time)
        names = [pool.name for pool in stats.actor_pools]
        self.keys = stage_keys(names)
        self.class_names = [class_name(name) for name in names]
        self.row: Metrics | None = None
        self.number = 0
        self.series = SharedSeries()
        self.is_concluded = False
        self.failure: Failure | None = None
        # The monitor is held so that its identity stays its own while the pipeline is known.
        self._monitor = monitor
        self._pools: tuple[Any, ...] = tuple(getattr(monitor, "_actor_pools", ()))
        self._tallies = [TaskTally.watch(pool) for pool in self._pools]
        self._batch_sizes = [_batch_size(pool) for pool in self._pools] or [1] * len(self.keys)
        self._stats = stats
        self._seen_s = float(stats.pipeline_duration_s)
        # Seconds, by stage: named as the bottleneck; with a ready actor; of all ready actors.
        self._named_s = [0.0] * len(self.keys)
        self._ready_s = [0.0] * len(self.keys)
        self._actor_s = [0.0] * len(self.keys)
        self._progress = 0.0
        first_pool = self._pools[0] if self._pools else None
        self._intake = Intake(stats, first_pool, self._batch_sizes[0] if self.keys else 1)

    @property
    def log_interval_s(self) -> float | None:
        """Seconds between two snapshots, as the pipeline was configured."""
        interval_s = getattr(self._monitor, "_log_interval_s", None)
        return None if interval_s is None else float(interval_s)

    def observe(self, stats: Any) -> Metrics:
        """Take in a snapshot and return its metrics."""
        stages = self._read(stats.actor_pools)
        self._stats = stats
        self.is_concluded, self.failure = False, None
        self._intake.observe(stats, stages)
        self._advance(stages)
        named = find_bottleneck(stages, int(self._intake.remaining))
        elapsed_s = max(0.0, stats.pipeline_duration_s - self._seen_s)
        self._seen_s = stats.pipeline_duration_s
        for index, stage in enumerate(stages):
            self._named_s[index] += elapsed_s if index == named else 0.0
            self._ready_s[index] += elapsed_s if stage.actors_ready else 0.0
            self._actor_s[index] += elapsed_s * stage.actors_ready
        return self._make_row(stats, stages, named)

    def conclude(
        self, failure: Failure | None, *, is_over: bool = True, ended_at: float | None = None
    ) -> Metrics:
        """Take the last snapshot from the pools' own counters and return its metrics.

        Args:
            failure: What ended the pipeline, None if it ended well.
            is_over: False for the view of a hook that ends before the pipeline does.
            ended_at: Unix time of the end, now if not given.
        """
        if self.is_concluded and self.row is not None:
            if failure is not None and self.failure is None:
                self.failure = failure
                self.number += 1
                self.row = {**self.row, **failure.as_metrics()}
            return self.row
        stats = self._last_stats(time.time() if ended_at is None else ended_at)
        stages = self._read(stats.actor_pools)
        if self._did_all(stages, failure):
            self._intake.remaining, self._progress = 0, 100.0
        else:
            self._intake.conclude(stages)
            self._advance(stages)
            self._fill_queues(stats, stages)
        number, row = self.number, self._make_row(stats, stages, self.bottleneck())
        if failure is not None:
            row |= failure.as_metrics()
        self.failure, self.is_concluded = failure, is_over
        if not is_over:
            self.number = number  # no row of the pipeline's series: it goes on
        return row

    def is_complete(self) -> bool:
        """Return whether all the pipeline's work is done, by its pools' counters."""
        return self._did_all(self._read(self._last_stats(time.time()).actor_pools), None)

    def is_stopped(self) -> bool:
        """Return whether no actor and no task is left in any pool."""
        stages = self._read(self._last_stats(time.time()).actor_pools)
        return bool(self._pools) and all(stage.is_stopped for stage in stages)

    def bottleneck(self) -> int | None:
        """Return the stage that held the whole pipeline up, None if nothing shows it.

        The one whose actors had the most work, in seconds per actor: with it, all others wait in
        the end. Where tasks were not timed, the one that snapshots named for most of the time.
        """
        busy_s = [
            (tally.busy_s if tally is not None else 0.0) / self._mean_actors(index)
            for index, tally in enumerate(self._tallies)
        ]
        for weights in (busy_s, self._named_s):
            if any(weights):
                return weights.index(max(weights))
        return None

    def bottleneck_key(self) -> str | None:
        """Return the metric name of `bottleneck`."""
        index = self.bottleneck()
        return None if index is None else self.keys[index]

    def signs(self) -> dict[str, str]:
        """Return the metric name of a stage by each text in an exception that tells of it."""
        signs: dict[str, str] = {}
        for stats in (self._stats, self._last_stats(time.time())):
            for key, pool in zip(self.keys, stats.actor_pools, strict=True):
                actor_ids = [*pool.ready_actor_pool_ids, *pool.pending_actor_pool_ids]
                signs |= dict.fromkeys([pool.name, *actor_ids], key)
        return signs

    def progress(self) -> list[StageProgress]:
        """Return how far each stage is, reading nothing but single numbers of the pools."""
        if not self._pools:  # then only the last snapshot tells
            done = [pool.task_stats.total_completed for pool in self._stats.actor_pools]
            return [StageProgress(*told, None) for told in zip(self.keys, done, strict=True)]
        found: list[StageProgress] = []
        samples: float | None = self._intake.num_inputs
        for key, batch_size, pool, tally in zip(
            self.keys, self._batch_sizes, self._pools, self._tallies, strict=True
        ):
            completed, spawned = pool._num_completed_tasks, pool._num_dynamically_spawned_tasks
            expected = None
            if samples is not None and not self._intake.is_serving:
                expected = max(completed, math.ceil(samples / batch_size))
            found.append(StageProgress(key, completed, expected))
            if expected is None or not completed:
                samples = None
            else:
                out = (completed - pool._num_null_tasks) * batch_size + spawned
                if tally is not None and tally.tasks >= completed:
                    out = tally.samples_out
                samples = out * expected / completed
        return found

    def release(self) -> None:
        """Give the pools back as they were, once nobody changes them any more."""
        if not self.is_concluded:
            return
        for pool, tally in zip(self._pools, self._tallies, strict=True):
            if tally is not None:
                tally.release(pool)

    def _mean_actors(self, index: int) -> float:
        """Return how many actors a stage had while it had any."""
        if self._ready_s[index] > 0:
            return self._actor_s[index] / self._ready_s[index]
        return max(1, getattr(self._pools[index], "_created_actor_count", 1))

    def _read(self, pool_stats: Sequence[Any]) -> list[Stage]:
        stages: list[Stage] = []
        handed_on = self._intake.num_inputs
        for index, stats in enumerate(pool_stats):
            pool = self._pools[index] if self._pools else None
            tally = self._tallies[index] if self._pools else None
            is_counted = tally is not None and tally.tasks >= stats.task_stats.total_completed
            stage = read_stage(
                stats,
                samples_in=handed_on,
                batch_size=self._batch_sizes[index],
                samples_out=tally.samples_out if tally is not None and is_counted else None,
                tasks_lost=getattr(pool, "_num_tasks_dropped_on_actor_death", 0),
            )
            stages.append(stage)
            handed_on = stage.samples_out
        return stages

    def _advance(self, stages: Sequence[Stage]) -> None:
        shares = completed_shares(stages, self._intake.num_inputs)
        percent = 100.0 * sum(shares) / len(shares) if shares else 0.0
        self._progress = max(self._progress, min(percent, MAX_UNFINISHED_PERCENT))

    def _did_all(self, stages: Sequence[Stage], failure: Failure | None) -> bool:
        """Return whether all work is done; a good end decides only what the counters leave open."""
        if not self._pools:
            return failure is None
        counted = all(
            tally is not None and tally.tasks >= stage.tasks_completed
            for tally, stage in zip(self._tallies, stages, strict=True)
        )
        if counted:
            return is_complete(stages, self._intake.num_inputs)
        is_over = all(stage.is_stopped for stage in stages)
        return failure is None and is_over and stages[0].samples_done >= self._intake.num_inputs

    def _last_stats(self, now: float) -> Any:
        """Return the last snapshot with the pools' counters of this moment in it."""
        if not self._pools:
            return self._stats
        stats = copy.copy(self._stats)
        stats.time, stats.pipeline_duration_s = now, max(0.0, now - stats.start_time)
        stats.actor_pools = [
            _read_pool(pool, last)
            for pool, last in zip(self._pools, self._stats.actor_pools, strict=True)
        ]
        with_actors = {pool.name for pool in stats.actor_pools if pool.actor_stats.ready}
        stats.resource_usage_per_stage = {
            name: usage
            for name, usage in self._stats.resource_usage_per_stage.items()
            if name in with_actors
        }
        return stats

    def _fill_queues(self, stats: Any, stages: Sequence[Stage]) -> None:
        """Say what lies between the stages of an unfinished pipeline, which no pool knows."""
        if not self._pools:
            return
        for pool, stage, following in zip(stats.actor_pools, stages, stages[1:], strict=False):
            between = stage.samples_out - following.samples_taken
            pool.task_stats.output_queue_size = max(0, between)

    def _make_row(self, stats: Any, stages: Sequence[Stage], named: int | None) -> Metrics:
        row = flatten(stats, self.keys)
        duration_s = float(stats.pipeline_duration_s)
        remaining = int(self._intake.remaining)
        num_outputs = int(stages[-1].samples_out) if stages else 0
        processed = self._intake.num_inputs - remaining
        row["progress"] = round(self._progress, 3)
        row["num_input_remaining"] = remaining
        row["num_outputs"] = num_outputs
        row["inputs_processed_per_s"] = processed / duration_s if duration_s > 0 else 0.0
        row["outputs_per_s"] = num_outputs / duration_s if duration_s > 0 else 0.0
        if named is not None:
            row["bottleneck_stage_index"] = named
            row["bottleneck_stage"] = self.keys[named]
        self.number += 1
        self.row = row
        return row


def _batch_size(pool: Any) -> int:
    return max(1, int(getattr(getattr(pool, "_params", None), "stage_batch_size", 1)))


def _read_pool(pool: Any, last: Any) -> Any:
    """Return a pool's counters, or a copy of the last ones if another thread keeps changing it."""
    for _ in range(READ_ATTEMPTS):
        try:
            return pool.make_stats()
        except RuntimeError:  # a dictionary changed its size while it was being read
            continue
    kept = copy.copy(last)
    kept.task_stats = copy.copy(last.task_stats)
    return kept
