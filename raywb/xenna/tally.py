"""Counting what a stage of a xenna pipeline hands on, task by task.

xenna's counters do not say how many samples a task returned when it returned fewer than it took: a
filter that returns `[]` cannot be told from a stage that passes everything on. (Returning `None`,
which is counted, ends the pipeline with a TypeError in 0.3 and in 0.5.) The record of each finished
task says it, but xenna fetches and drops the records a hundred times a second.

So the list in which a pool keeps these records is replaced, for the time of a hook, by the same
list that also adds up. No class is patched for it, and where the list is not what is expected,
nothing is replaced and xenna's counters serve as an estimate (`stats.read_stage`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

#: The pool's list of finished tasks' records that nobody has fetched yet.
RECORDS = "_task_result_metadatas"


class TaskTally(collections.deque[Any]):
    """A pool's list of finished tasks' records, which also adds up what went through it.

    Attributes:
        tasks: Records seen.
        samples_out: Samples in the results that are handed on.
        busy_s: Seconds that actors spent on the tasks.
    """

    def __init__(self, records: Iterable[Any], maxlen: int | None) -> None:
        super().__init__(maxlen=maxlen)
        self.tasks = 0
        self.samples_out = 0
        self.busy_s = 0.0
        for record in records:
            self.append(record)

    def append(self, record: Any) -> None:
        """Keep a record as xenna does, and count it; this may not fail, xenna's loop calls it."""
        super().append(record)
        try:
            if record.failure_info.should_process_further:
                self.samples_out += record.num_returns
            # A stage that works on several tasks at once says itself how long each one counts.
            spent_s = getattr(record, "rate_duration_s", None)
            if spent_s is None:
                spent_s = record.timing.process_end_time_s - record.timing.process_start_time_s
            self.busy_s += max(0.0, spent_s)
            self.tasks += 1
        except (AttributeError, TypeError):
            # A record of another shape: `tasks` stays behind xenna's own count of completed
            # tasks, by which `Pipeline` sees that this tally is not to be relied on.
            return

    @classmethod
    def watch(cls, pool: Any) -> TaskTally | None:
        """Put a tally in the place of a pool's records, or return None where that cannot be."""
        records = getattr(pool, RECORDS, None)
        if isinstance(records, cls):
            return records  # of a hook that ended while the pipeline ran on
        if type(records) is not collections.deque:
            return None
        tally = cls(records, records.maxlen)
        setattr(pool, RECORDS, tally)
        return tally

    def release(self, pool: Any) -> None:
        """Give the pool a plain list back."""
        if getattr(pool, RECORDS, None) is self:
            setattr(pool, RECORDS, collections.deque(self, self.maxlen))
