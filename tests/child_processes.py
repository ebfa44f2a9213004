"""What a process has started: found by name, and signalled, while some of it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil

__all__ = ["CORE", "SINK", "children", "signal_all"]

#: The writer to W&B, and W&B's own process below it.
SINK, CORE = "raywb.service.wandb_sink", "wandb-core"


def children(of: psutil.Process, *names: str) -> list[psutil.Process]:
    """Those with one of the names in their command; who has ended, waited for or not, is none."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in of.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # A zombie's error is one, too.
                command = " ".join(child.cmdline())
                if any(name in command for name in names):
                    found.append(child)
    return found


def signal_all(processes: Iterable[psutil.Process], number: int) -> None:
    """Send a signal to each; one that has ended, perhaps since another of them did, needs none."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
