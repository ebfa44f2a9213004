"""One stage that logs rows, as its rows leave it: newest values, a thinned history, the pace.

A row with a known combination of keys is kept as it is, in place of the one before it; which value
of a key is the newest is put together when somebody asks.
"""

from __future__ import annotations

import array
import math
from collections import deque
from collections.abc import Iterator, Mapping
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

#: A row so far behind the last mark is of another time: one of the two has a wrong one, in seconds.
FAR_S = 60.0

#: Over less time than this a pace says nothing, in seconds.
LEAST_S = 0.1

#: So many marks in a row behind the furthest step, or the latest time, mean that a training began
#: again further back, or that the time was a wrong one.
MARKS_BACK = 5

#: Keys of a row that was made of several ranks.
_RANKS, _SLOWEST, _SPREAD = "ranks", "slowest_rank", "rank_spread_s"


def _is_number(value: Scalar | None) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Scalar | None) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _count(value: Scalar | None) -> int | None:
    found = _finite(value)
    return int(found) if found is not None and abs(found) < 2**53 else None


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
        stage.seen = self.number = next(stage.ticks)
        if self.has_main:
            stage.until_kept -= 1
            if stage.until_kept <= 0:
                stage.keep(row)
        if not stage.no_mark_s <= row.time_s < stage.next_mark_s:
            stage.mark(row)

    def forget(self) -> None:
        """Leave the newest values with the stage."""
        self.stage.absorb()


class LiveStage:
    """The state of one stage.

    Args:
        name: its namespace.
        ticks: counts the rows of all stages.
        axes: the axis of each namespace that has one.
        key_axes: the axis of each key that has one of its own.

    Attributes:
        prefix: what stands before its keys.
        row: its newest row.
        seen: the number of that one among the rows of all stages; time says less, as users set it.
        until_kept: rows with its main value until one is kept again.
        no_mark_s, next_mark_s: between these times no row serves as a mark of its pace.
    """

    def __init__(
        self,
        name: str,
        ticks: Iterator[int],
        axes: Mapping[str, str],
        key_axes: Mapping[str, str],
    ) -> None:
        self.name = name
        self.prefix = name + "/" if name else ""
        self.ticks = ticks
        self.row: OutRow | None = None
        self.seen = -1
        self.until_kept = 0
        self.no_mark_s = self.next_mark_s = -math.inf
        self._axes = axes
        self._key_axes = key_axes
        self._alike: list[RowsAlike] = []
        self._keys: dict[str, None] = {}
        self._values: dict[str, Scalar] = {}
        self._main: str | None = None
        self._history = array.array("d")
        self._stride = 1
        self._marks: deque[tuple[float, float]] = deque(maxlen=MARKS)
        self._marks_back = self._times_back = 0

    @property
    def axis(self) -> str:
        """The full name of its step: what its main value is drawn on."""
        if self._main is not None and self._main in self._key_axes:
            return self._key_axes[self._main]
        return self._axes.get(self.name, self.prefix + "step")

    @property
    def key_count(self) -> int:
        """How many keys it has."""
        return len(self._keys)

    def rows_alike(self, keys: list[str], row: OutRow) -> RowsAlike:
        """Rows with these keys will come; the first of them is given."""
        own = self._own_keys()
        fresh = [key for key in keys if key not in self._keys and key not in own]
        self._keys |= dict.fromkeys(fresh)
        self._choose_main([key for key in fresh if _is_number(row.metrics[key])])
        alike = RowsAlike(self, has_main=self._main in row.metrics)
        self._alike.append(alike)
        return alike

    def take_over(self, other: LiveStage) -> None:
        """Take from another stage those keys that are this one's; no combinations are known."""
        taken = [key for key in other._keys if key.startswith(self.prefix)]
        if not taken:
            return
        is_newer = other.seen > self.seen
        for key in taken:
            del other._keys[key]
            value = other._values.pop(key, None)
            if value is not None and (is_newer or key not in self._values):
                self._values[key] = value
            self._keys[key] = None
        if is_newer:
            self.row, self.seen = other.row, other.seen
        main = other._main
        if main is not None and main not in other._keys:
            if self._main is None or self._rank(main) < self._rank(self._main):
                self._main, self._history = main, other._history
                self._stride, self.until_kept = other._stride, other.until_kept
            other._main = None
            other._history = array.array("d")
            other._choose_main(other._numbers())
        self._choose_main([key for key in taken if _is_number(self._values.get(key))])

    def drop_surplus(self, limit: int) -> list[str]:
        """Keep no more keys than so many, the main one among them; which ones go."""
        surplus = [key for key in list(self._keys)[limit:] if key != self._main]
        for key in surplus:
            del self._keys[key]
            self._values.pop(key, None)
        return surplus

    def all_keys(self) -> set[str]:
        """Its keys with those that are no metrics."""
        return self._keys.keys() | self._own_keys()

    def axis_has_changed(self) -> None:
        """Another key is the step now: it is no metric any more, and the pace begins anew."""
        self._begin_marks()
        self._choose_main(self._numbers())

    def _numbers(self) -> list[str]:
        own = self._own_keys()
        newest = self._newest()
        return [key for key in newest if key not in own and _is_number(newest[key])]

    def _own_keys(self) -> set[str]:
        """Keys that are no metrics: its axis, and what is said of its ranks."""
        return {self.axis, *(self.prefix + key for key in (_RANKS, _SLOWEST, _SPREAD))}

    def _choose_main(self, fresh: list[str]) -> None:
        """Its loss, where it has one: the key of that name, else one that has it in it."""
        main = None if self._main in self._own_keys() else self._main
        chosen = min([*([main] if main else []), *fresh], key=self._rank, default=None)
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
        value = row.metrics.get(self._main) if self._main else None
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
        step = _finite(row.metrics.get(self.axis))
        if step is None or not math.isfinite(row.time_s):
            return
        if self._marks and row.time_s < self._marks[-1][0] - FAR_S:
            self._times_back += 1
            if self._times_back < MARKS_BACK:
                return
            self._begin_marks()
        self._times_back = 0
        self.no_mark_s, self.next_mark_s = row.time_s - FAR_S, row.time_s + MARK_S
        if self._marks and step < self._marks[-1][1]:
            self._marks_back += 1
            if self._marks_back < MARKS_BACK:
                return
            self._marks.clear()
        self._marks_back = 0
        self._marks.append((row.time_s, step))

    def _begin_marks(self) -> None:
        self._marks.clear()
        self._marks_back = self._times_back = 0
        self.no_mark_s = self.next_mark_s = -math.inf

    def absorb(self) -> None:
        """Keep the newest values without the combinations of keys that they came in."""
        if self._alike:
            self._values = self._newest()
            self._alike.clear()

    def _newest(self) -> dict[str, Scalar]:
        values = dict(self._values)
        for alike in sorted(self._alike, key=lambda one: one.number):
            if alike.row is not None:
                # Keys that are not the stage's are left out below.
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
        passed_s = latest_s - began_s
        if passed_s < LEAST_S:
            return None
        return _finite((furthest - began) / passed_s)

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
        number = _finite(step)
        ranks, slowest, spread = (
            metrics.get(self.prefix + key) for key in (_RANKS, _SLOWEST, _SPREAD)
        )
        return StageProgress(
            stage=self.name,
            run=run,
            step=number,
            steps_per_s=self._steps_per_s(row, number),
            metrics={key[cut:]: float(newest[key]) for key in listed},
            main=None if main is None else main[cut:],
            history=history,
            time_s=row.time_s,
            ranks=_count(ranks),
            slowest_rank=_count(slowest),
            rank_spread_s=_finite(spread),
        )
