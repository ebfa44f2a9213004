"""One time limit for everything, also for what cannot be interrupted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from raywb.errors import FleetTimeout

__all__ = ["Deadline", "within"]

_T = TypeVar("_T")


class Deadline:
    """A moment on the monotonic clock by which all has to be done.

    Args:
        limit_s: how far away it is.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._at = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """What is left of the time, in seconds; never below 0."""
        return max(self._at - time.monotonic(), 0.0)


def within(deadline: Deadline, what: str, work: Callable[[], _T]) -> _T:
    """Do ``work``, and leave it alone when the time is over.

    Timeouts of HTTP clients hold between two bytes, so a server that trickles passes them all.
    The work runs in a daemon thread that is abandoned, and does not keep the process.

    Args:
        deadline: when the time is over.
        what: what is being done, for the error's text.
        work: what to do; what it raises is raised here.

    Raises:
        FleetTimeout: it was not done in time.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name=f"raywb-fleet: {what}", daemon=True)
    thread.start()
    thread.join(deadline.left_s)
    if errors:
        raise errors[0]
    if not results:
        raise FleetTimeout(f"{what} was not done within {deadline.limit_s:g} s")
    return results[0]
