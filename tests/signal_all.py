"""A signal to several processes, of which some may end meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil

__all__ = ["signal_all"]


def signal_all(processes: Iterable[psutil.Process], number: int) -> None:
    """Send a signal to each; one that has ended, perhaps since another of them did, needs none."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
