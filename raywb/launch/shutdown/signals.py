"""Signals that end the command: when they are heeded, and what they mean.

Only the command's own process uses this, for as long as the command runs.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Self

__all__ = ["Signals", "Stopped"]

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """Raised where the command is when it is told to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Raises :class:`Stopped`, or only notes the signal while the place is being asked to end.

    What is asked for cannot be taken back, and has to be known: so that is not cut off.

    As a context manager it gives the signals back at the end.

    Attributes:
        noted: the first signal that came while none was to be heeded.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self._are_noted_only = False
        self._before = {number: signal.getsignal(number) for number in _NUMBERS}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Take the signals; again where a library has taken them since."""
        for number in _NUMBERS:
            signal.signal(number, self._take)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if not self._are_noted_only:
            raise Stopped(number)
        if self.noted is None:
            self.noted = number

    @contextlib.contextmanager
    def noted_only(self) -> Iterator[None]:
        """Within the block the command goes on, whatever it is told."""
        self._are_noted_only = True
        try:
            yield
        finally:
            self._are_noted_only = False
