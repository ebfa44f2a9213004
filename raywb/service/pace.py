"""When the ranks of a stage came how far: no clock is read here, every time is the caller's."""

from __future__ import annotations

from collections import deque

__all__ = ["Pace"]

#: Moments of the front that are remembered, and the least time between two of them, in seconds:
#: with very short steps, too, they reach back further than any rank may be silent.
REMEMBERED_MOMENTS = 100
MOMENTS_APART_S = 1.0

#: The latest steps whose longest is the stage's.
LATEST_STEPS = 10

#: Time in which half of the longest pause is forgotten, in seconds: longer than from one
#: validation or checkpoint to the next.
PAUSE_HALF_LIFE_S = 3600.0

_Step = int | float


class Pace:
    """The front of a stage's ranks, and when each was heard.

    Attributes:
        heard: when the last row of each rank came.
        front: steps of the furthest rank, and when it was first at or beyond them; the latest
            step is the last one.
        first_s: when the first row came.
    """

    __slots__ = ("_gaps", "_pause", "first_s", "front", "heard")

    def __init__(self) -> None:
        self.heard: dict[int, float] = {}
        self.front: deque[tuple[_Step, float]] = deque(maxlen=REMEMBERED_MOMENTS)
        self.first_s: float | None = None
        self._gaps: deque[float] = deque(maxlen=LATEST_STEPS)
        #: The longest time between two steps, less what of it was forgotten, and as of when.
        self._pause = (0.0, 0.0)

    def note(self, rank: int, step: _Step, now_s: float) -> None:
        """A rank has logged a step."""
        self.heard[rank] = now_s
        front = self.front
        if not front:
            self.first_s = now_s
            front.append((step, now_s))
        elif step > front[-1][0]:
            self._note_gap(now_s - front[-1][1], now_s)
            if len(front) > 1 and front[-1][1] - front[-2][1] < MOMENTS_APART_S:
                front[-1] = (step, now_s)
            else:
                front.append((step, now_s))

    def _note_gap(self, gap_s: float, now_s: float) -> None:
        # The first step often compiles: nothing later is like it.
        if self._gaps and gap_s > self.pause_s(now_s):
            self._pause = (gap_s, now_s)
        self._gaps.append(gap_s)

    def pause_s(self, now_s: float) -> float:
        """Longest time between two steps but the first ones; slowly forgotten."""
        pause_s, at = self._pause
        return float(pause_s * 0.5 ** ((now_s - at) / PAUSE_HALF_LIFE_S))

    @property
    def step_s(self) -> float | None:
        """Longest time between two of the latest steps; None before the third, since a first
        step often compiles."""
        return max(self._gaps) if len(self._gaps) > 1 else None

    def passed_at(self, step: _Step | None) -> float | None:
        """When the front went beyond this step, as far as it is remembered; None when it has not.

        It is up to :data:`MOMENTS_APART_S` too late.
        """
        if step is None:
            return self.first_s
        return next((at for reached, at in self.front if reached > step), None)
