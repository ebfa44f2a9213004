"""Wait for the notice that this machine, or this job, is about to end: a signal, or EC2's.

Signals are waited for, not handled: in the one process that does nothing else.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from raywb.launch.drain.spot_notice import MetadataUnreachable, SpotNotice

__all__ = ["Notice", "defer_signals", "disregard_signals", "wait_for_notice"]

#: Signals by which a machine or a scheduler says that the end is near.
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

#: Pause between two looks at EC2's metadata, in seconds: as often as EC2 advises.
LOOK_PAUSE_S = 5.0

#: The same where there is no such service, in seconds.
UNREACHABLE_PAUSE_S = 60.0


class Notice(NamedTuple):
    """Why the end is near, and when it is, in seconds from now; None where nobody says when."""

    reason: str
    in_s: float | None = None


def defer_signals() -> None:
    """From now on the signals of :data:`ENDING` wait until they are waited for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def disregard_signals() -> None:
    """From now on they are as if they did not come: the drain is on already.

    What this process starts inherits that, or the same signal would end the work half-way.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def wait_for_notice(
    spot: SpotNotice | None, tell: Callable[[str], None], pause_s: float = LOOK_PAUSE_S
) -> Notice:
    """Wait until the end is announced; the signals must have been deferred.

    Args:
        spot: the way to EC2's notice; None looks for signals alone.
        tell: is told once when there is no metadata service.
        pause_s: between two looks at it.
    """
    was_told = False
    while True:
        wait_s = pause_s
        if spot is not None:
            try:
                announced = spot.look()
            except MetadataUnreachable as error:
                wait_s = max(UNREACHABLE_PAUSE_S, pause_s)
                if not was_told:
                    was_told = True
                    tell(f"No notice of EC2's can come ({error}): signals alone are waited for")
            else:
                if announced is not None:
                    action, at_s = announced
                    return Notice(f"EC2 announces: {action}", max(at_s - time.time(), 0.0))
        received = signal.sigtimedwait(ENDING, wait_s)
        if received is not None:
            return Notice(signal.Signals(received.si_signo).name)
