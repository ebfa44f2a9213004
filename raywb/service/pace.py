"""When the ranks of a stage came how far: no clock is read here, every time is the caller's."""

from __future__ import annotations

import itertools
from collections import deque

__all__ = ["Pace"]

#: Steps of the front that are remembered.
REMEMBERED_STEPS = 50

_Step = int | float


class Pace:
    """The front of a stage's ranks, and when each was heard.

    Attributes:
        heard: when the last row of each rank came.
        front: the furthest steps of any rank, and when each was first reached; the latest last.
        first_s: when the first row came.
    """

    __slots__ = ("first_s", "front", "heard")

    def __init__(self) -> None:
        self.heard: dict[int, float] = {}
        self.front: deque[tuple[_Step, float]] = deque(maxlen=REMEMBERED_STEPS)
        self.first_s: float | None = None

    def note(self, rank: int, step: _Step, now_s: float) -> None:
        """A rank has logged a step."""
        self.heard[rank] = now_s
        front = self.front
        if not front or step > front[-1][0]:
            if self.first_s is None:
                self.first_s = now_s
            front.append((step, now_s))

    @property
    def step_s(self) -> float | None:
        """Longest time between two of the latest steps; None before the third, since a first
        step often compiles."""
        times = [at for _, at in self.front]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return max(gaps[-10:]) if len(gaps) > 1 else None

    def passed_at(self, step: _Step | None) -> float | None:
        """When the front went beyond this step; None when it has not."""
        for reached, at in self.front:
            if step is None or reached > step:
                return at
        return None
