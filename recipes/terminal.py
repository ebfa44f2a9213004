"""What a recipe shows a person: steps, a bar per stage, a summary; everything else goes to a log.

Ray, cosmos-xenna and libraries in C++ and Rust write to the process's standard output and error as
they like. While a recipe runs, both lead into a log file, and the recipe alone writes to where
they led before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["Snapshot", "StageProgress", "Terminal", "quiet_terminal"]

#: Stage name, tasks completed, tasks expected (None while unknown).
StageProgress = tuple[str, int, int | None]
Snapshot = Callable[[], Sequence[StageProgress] | None]

#: How often the bars are drawn anew.
_REFRESH_S = 0.5
#: How often a plain line is written where there is no terminal.
_PLAIN_LINE_S = 15.0


class Terminal:
    """Writes steps and progress to standard error, results to standard output.

    Args:
        out: Standard output.
        err: Standard error.
        plain_line_s: How often a line tells the progress where there is no terminal.
    """

    def __init__(self, out: TextIO, err: TextIO, plain_line_s: float = _PLAIN_LINE_S) -> None:
        self._plain_line_s = plain_line_s
        self._out = Console(file=out, soft_wrap=True, highlight=False, markup=False)
        self._err = Console(file=err, soft_wrap=True, highlight=False, markup=False)

    def result(self, text: str) -> None:
        """Write to standard output."""
        self._out.print(text)

    def step(self, text: str) -> None:
        """Say on standard error what is being done."""
        self._err.print(text, style="dim")

    def error(self, text: str) -> None:
        """Say on standard error what went wrong."""
        self._err.print(text, style="bold red")

    @contextlib.contextmanager
    def progress(self, snapshot: Snapshot) -> Iterator[None]:
        """Show how far the stages are, from another thread, until the block is left.

        Args:
            snapshot: Returns the state to show, or None while there is none yet.
        """
        stop = threading.Event()
        show = self._show_bars if self._err.is_terminal else self._show_lines
        thread = threading.Thread(target=show, args=(snapshot, stop), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _show_bars(self, snapshot: Snapshot, stop: threading.Event) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        bars: dict[str, TaskID] = {}
        with Progress(*columns, console=self._err) as progress:
            stopped = False
            while not stopped:
                stopped = stop.wait(_REFRESH_S)  # once more after the end, for the last state
                for name, completed, expected in snapshot() or ():
                    if name not in bars:
                        bars[name] = progress.add_task(name, total=expected)
                    progress.update(bars[name], completed=completed, total=expected)

    def _show_lines(self, snapshot: Snapshot, stop: threading.Event) -> None:
        last_line, due_at = "", time.monotonic() + self._plain_line_s
        while not stop.wait(_REFRESH_S):
            if time.monotonic() < due_at:
                continue
            line = ", ".join(
                f"{name} {completed}/{'?' if expected is None else expected}"
                for name, completed, expected in snapshot() or ()
            )
            if line and line != last_line:
                self.step(line)
                last_line, due_at = line, time.monotonic() + self._plain_line_s


@contextlib.contextmanager
def quiet_terminal(log: Path) -> Iterator[Terminal]:
    """Lead this process's standard output and error into a log file, and yield the way around it.

    What child processes inherit leads into the log as well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = (os.dup(1), os.dup(2))
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        with (
            os.fdopen(saved[0], "w", closefd=False) as out,
            os.fdopen(saved[1], "w", closefd=False) as err,
        ):
            yield Terminal(out, err)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
