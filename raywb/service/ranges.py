"""Which bytes of a journal were used: ranges that grow together."""

from __future__ import annotations

import bisect

__all__ = ["Ranges"]


class Ranges:
    """A set of offsets, kept as disjoint ranges in ascending order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, end: int) -> None:
        """Add the offsets from ``start`` up to, not with, ``end``."""
        first = bisect.bisect_left(self._ends, start)
        last = bisect.bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def covers(self, offset: int) -> bool:
        """Whether ``offset`` is in one of the ranges."""
        index = bisect.bisect_right(self._starts, offset) - 1
        return index >= 0 and offset < self._ends[index]

    def forget_before(self, offset: int) -> None:
        """Drop the ranges that end at or before ``offset``."""
        if self._ends and self._ends[0] <= offset:
            index = bisect.bisect_right(self._ends, offset)
            del self._starts[:index], self._ends[:index]
