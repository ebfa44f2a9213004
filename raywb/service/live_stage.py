"""One stage that logs rows, as its rows leave it: newest values, a thinned history, the pace.

A row with a known combination of keys is kept as it is, in place of the one before it; which value
of a key is the newest is put together when somebody asks.
"""

from __future__ import annotations

import array
from collections import deque
from typing import TypeGuard

from raywb.live import StageProgress
from raywb.rows import Scalar
from raywb.service.outbox import OutRow

__all__ = ["LiveStage", "RowsAlike"]

#: Values of a history: thinned to the first number when there would be more than the second.
HISTORY_VALUES = 60
MOST_HISTORY_VALUES = 2 * HISTORY_VALUES

#: Metrics of a stage that are named one by one.
LISTED_METRICS = 64

#: The pace is taken over the latest rows: at least so far apart, in seconds, and so many of them.
MARK_S = 1.0
MARKS = 32

#: So many marks in a row behind the furthest step mean that a training began again further back.
MARKS_BACK = 5

#: Keys of a row that was made of several ranks.
_RANKS, _SLOWEST, _SPREAD = "ranks", "slowest_rank", "rank_spread_s"


def _is_number(value: Scalar | None) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class RowsAlike:
    """Rows of one stage that have the same keys."""

    __slots__ = ("has_main", "number", "row", "stage")

    def __init__(self, stage: LiveStage, *, has_main: bool) -> None:
        self.stage = stage
        self.has_main = has_main
        self.row: OutRow | None = None
        self.number = 0

    def take(self, row: OutRow) -> None:
        """Take one row in."""
        stage = self.stage
        self.row = stage.row = row
        stage.count = self.number = stage.count + 1
        if self.has_main:
            stage.until_kept -= 1
            if stage.until_kept <= 0:
                stage.keep(row)
        if row.time_s >= stage.next_mark_s:
            stage.mark(row)

    def forget(self) -> None:
        """Leave the newest values with the stage."""
        self.stage.absorb()


class LiveStage:
    """The state of one stage.

    Attributes:
        prefix: what stands before its keys.
        axis: the full name of its step.
        row: its newest row.
        count: rows so far.
        until_kept: rows with its main value until one is kept again.
        next_mark_s: from which time on a row serves as a mark of its pace.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.prefix = name + "/" if name else ""
        self.axis = self.prefix + "step"
        self.row: OutRow | None = None
        self.count = 0
        self.until_kept = 0
        self.next_mark_s = -float("inf")
        self._alike: list[RowsAlike] = []
        self._keys: dict[str, None] = {}
        self._values: dict[str, Scalar] = {}
        self._main: str | None = None
        self._history = array.array("d")
        self._stride = 1
        self._marks: deque[tuple[float, float]] = deque(maxlen=MARKS)
        self._marks_back = 0

    def rows_alike(self, keys: list[str], row: OutRow) -> RowsAlike:
        """Rows with these keys will come; the first of them is given."""
        own = self._own_keys()
        fresh = [key for key in keys if key not in self._keys and key not in own]
        self._keys |= dict.fromkeys(fresh)
        numbers = [key for key in fresh if _is_number(row.metrics[key])]
        self._choose_main(numbers)
        alike = RowsAlike(self, has_main=self._main in row.metrics)
        self._alike.append(alike)
        return alike

    def _own_keys(self) -> set[str]:
        """Keys that are no metrics: its axis, and what is said of its ranks."""
        return {self.axis, *(self.prefix + key for key in (_RANKS, _SLOWEST, _SPREAD))}

    def _choose_main(self, fresh: list[str]) -> None:
        """Its loss, where it has one: the key of that name, else one that has it in it."""
        chosen = min([*([self._main] if self._main else []), *fresh], key=self._rank, default=None)
        if chosen != self._main:
            self._main = chosen
            self._history = array.array("d")
            self._stride, self.until_kept = 1, 0
            for alike in self._alike:
                alike.has_main = alike.row is not None and chosen in alike.row.metrics

    def _rank(self, key: str) -> int:
        name = key[len(self.prefix) :].lower()
        return 0 if name == "loss" else 1 if "loss" in name else 2

    def keep(self, row: OutRow) -> None:
        """Add a row's main value to the history; of a full one, every second value stays."""
        value = row.metrics[self._main] if self._main else None
        if not _is_number(value):
            self.until_kept = 0
            return
        self._history.append(float(value))
        if len(self._history) > MOST_HISTORY_VALUES:
            self._history = self._history[::2]
            self._stride *= 2
        self.until_kept = self._stride

    def mark(self, row: OutRow) -> None:
        """Note when the stage was at which step."""
        step = row.metrics.get(self.axis)
        if not _is_number(step) or step != step:
            return
        self.next_mark_s = row.time_s + MARK_S
        if self._marks and step < self._marks[-1][1]:
            self._marks_back += 1
            if self._marks_back < MARKS_BACK:
                return
            self._marks.clear()
        self._marks_back = 0
        self._marks.append((row.time_s, float(step)))

    def absorb(self) -> None:
        """Keep the newest values without the combinations of keys that they came in."""
        if self._alike:
            self._values = self._newest()
            self._alike.clear()

    def _newest(self) -> dict[str, Scalar]:
        values = dict(self._values)
        for alike in sorted(self._alike, key=lambda one: one.number):
            if alike.row is not None:
                values.update(alike.row.metrics)
        own = self._own_keys()
        return {key: values[key] for key in self._keys if key in values and key not in own}

    def _steps_per_s(self, row: OutRow, step: float | None) -> float | None:
        if not self._marks or step is None:
            return None
        latest_s, furthest = self._marks[-1]
        if step >= furthest and row.time_s > latest_s:
            latest_s, furthest = row.time_s, step
        began_s, began = self._marks[0]
        return (furthest - began) / (latest_s - began_s) if latest_s > began_s else None

    def describe(self, run: int) -> StageProgress:
        """The stage at this moment; only of one that has a row."""
        assert self.row is not None
        row, metrics = self.row, self.row.metrics
        cut = len(self.prefix)
        newest = {key: value for key, value in self._newest().items() if _is_number(value)}
        listed = list(newest)[:LISTED_METRICS]
        main = self._main if self._main in newest else None
        if main is not None and main not in listed:
            listed[-1] = main
        history = list(self._history)
        if main is not None and self.until_kept not in (0, self._stride):
            history.append(float(newest[main]))
        step = metrics.get(self.axis)
        ranks, slowest, spread = (
            metrics.get(self.prefix + key) for key in (_RANKS, _SLOWEST, _SPREAD)
        )
        number = float(step) if _is_number(step) else None
        return StageProgress(
            stage=self.name,
            run=run,
            step=number,
            steps_per_s=self._steps_per_s(row, number),
            metrics={key[cut:]: float(newest[key]) for key in listed},
            main=None if main is None else main[cut:],
            history=history,
            time_s=row.time_s,
            ranks=int(ranks) if _is_number(ranks) else None,
            slowest_rank=int(slowest) if _is_number(slowest) else None,
            rank_spread_s=float(spread) if _is_number(spread) else None,
        )
