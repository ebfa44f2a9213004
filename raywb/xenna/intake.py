"""How many inputs a xenna pipeline has, and how many it has not taken in yet, in samples.

xenna says how many are left, but in each of its modes something else:

- streaming: samples that are not in the first stage yet. True while it runs; 0 in the extra
  snapshot that it takes at its end for a metrics port, and nothing at the end without one.
- batch: all inputs, counted in tasks, from the beginning to the end.
- serving: samples that have come and wait, of which there may be more than at the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from raywb.xenna.stats import Stage


class Intake:
    """The inputs of one pipeline.

    Attributes:
        num_inputs: Inputs known so far.
        remaining: Those that are not taken in; in batch mode, that no actor has been given.
        is_serving: Whether inputs may still come, so that nobody knows how many there will be.

    Args:
        stats: The pipeline's first snapshot.
        first_pool: The pool of its first stage, where it is known.
        batch_size: The first stage's batch size.
    """

    def __init__(self, stats: Any, first_pool: Any | None, batch_size: int) -> None:
        initial, left = stats.num_initial_input_tasks, stats.num_input_tasks_remaining
        self.num_inputs = int(initial)
        self.remaining: float = math.inf
        self.is_serving = False
        self._has_pools = first_pool is not None
        self._is_batch = False
        if not stats.actor_pools:
            return
        tasks, slots = stats.actor_pools[0].task_stats, stats.actor_pools[0].slot_stats
        taken = tasks.total_completed + tasks.input_queue_size + slots.num_used
        # Only in batch mode are all inputs in the first stage from the start.
        self._is_batch = taken == initial == left > 0
        self._last_batch_lacks = _missing_in_last_batch(first_pool, batch_size)

    def observe(self, stats: Any, stages: Sequence[Stage]) -> None:
        """Bring the numbers up to a snapshot of the running pipeline."""
        initial, left = stats.num_initial_input_tasks, stats.num_input_tasks_remaining
        if not stages:
            self.num_inputs, self.remaining = initial, left
            return
        first = stages[0]
        if self._is_batch:
            self.num_inputs = initial * first.batch_size - self._last_batch_lacks
            self.remaining = min(self.remaining, self._queued(first))
            return
        taken = first.samples_done + first.tasks_queued * first.batch_size
        if taken + left >= initial + first.batch_size:
            self.is_serving = True  # more came than there was at the start
        if self.is_serving:
            self.num_inputs = max(self.num_inputs, first.samples_taken + left)
            self.remaining = left
        elif self._has_pools:
            # What the first stage took in has a say because of the extra snapshot at the end.
            self.num_inputs = initial
            self.remaining = min(self.remaining, max(left, initial - first.samples_taken))
        else:
            self.num_inputs, self.remaining = initial, left

    def conclude(self, stages: Sequence[Stage]) -> None:
        """Bring the numbers up to the end of a pipeline that did not do all its work.

        A pool that xenna has stopped, as 0.5 does when a pipeline fails, has forgotten what was
        queued in it: then it is the last snapshot that says what was taken in, or what was done.
        """
        if not stages or self.is_serving:
            return
        first = stages[0]
        left = self.num_inputs - first.samples_taken
        if self._is_batch and not first.is_stopped:
            left = self._queued(first)
        self.remaining = max(0, min(self.remaining, left))

    def _queued(self, first: Stage) -> int:
        return max(0, first.tasks_queued * first.batch_size - self._last_batch_lacks)


def _missing_in_last_batch(pool: Any | None, batch_size: int) -> int:
    """Return by how many samples the last task that waits in a pool is short of a full batch."""
    queue = getattr(pool, "_task_queue", ())
    samples = getattr(queue[-1], "task_data", None) if queue else None
    return batch_size - len(samples) if samples else 0
