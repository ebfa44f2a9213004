"""``raywb watch``: the picture of a run that renews itself, until q or Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import IO

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.text import Text

from raywb.reports import Status
from raywb.view.delivery import Pace
from raywb.view.drawing import DIM, Encodable, Lines, Pen, duration
from raywb.view.frame import frame_lines
from raywb.view.status_feed import Answer, StatusFeed, feed_command, serve_statuses

__all__ = ["watch", "watch_command"]

#: How soon a key, and another size of the window, are noticed, in seconds.
TICK_S = 0.2

#: The clock, and how long ago things were, go on so often while there is no news, in seconds.
REDRAW_S = 1.0

#: How late an answer may be before the picture says that it is old, in seconds.
PATIENCE_S = 2.0

_QUIT_KEYS = frozenset("qQ\x03\x04")


class Picture:
    """What is to be shown: the newest status, and what has come between.

    Args:
        interval_s: how often a status is to come.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._status: Status | None = None
        self._pace = Pace()
        self._told_s = 0.0
        self._trouble: str | None = None

    def take(self, answer: Answer, now_s: float, steady_s: float) -> None:
        """Take in what the feed says.

        Args:
            answer: from the feed.
            now_s: the present, in seconds since the epoch.
            steady_s: the same moment on a clock that never goes back.
        """
        if answer.status is not None:
            self._status, self._trouble, self._told_s = answer.status, None, now_s
            self._pace.note(answer.status, steady_s)
        elif answer.trouble is not None:
            self._trouble = answer.trouble

    def lines(
        self, width: int, height: int, now_s: float, *, ascii_only: bool, keys: bool = True
    ) -> list[Text]:
        """The picture for a terminal of this size, with or without a keyboard."""
        pen = Pen(width, now_s, ascii_only)
        if self._status is None:
            return [Text("raywb: asking the service ...", DIM)]
        dot = f" {pen.sign('·', '|')} "
        foot = Text(f"{'q' if keys else 'Ctrl-C'} quits{dot}every {self._interval_s:g} s{dot}", DIM)
        foot.append(f"raywb {self._status.version}")
        return frame_lines(
            self._status, pen, height, pace=self._pace, trouble=self._troubles(now_s), foot=foot
        )

    def _troubles(self, now_s: float) -> list[str]:
        old_s = max(now_s - self._told_s, 0.0)
        if self._trouble is None and old_s < self._interval_s + PATIENCE_S:
            return []
        told = (
            f"no answer since {_clock(self._told_s)}, this is {duration(old_s)} old; still asking"
        )
        reason = self._trouble or "a service that restarts is back within seconds"
        return [f"{told} ({reason})"]


def _clock(time_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def watch(feed: StatusFeed, console: Console, interval_s: float) -> None:
    """Show what the feed says until q or Ctrl-C.

    Args:
        feed: where statuses come from.
        console: a terminal.
        interval_s: how often the feed says something.

    Raises:
        RaywbError: there is no cluster or no service to begin with.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        with JobControl() as job:
            answer = None
            while answer is None:
                answer = _first(feed, console, job)
                job.obey(feed)
            answer.raise_trouble()
            picture = Picture(interval_s)
            picture.take(answer, time.time(), time.monotonic())
            while _show(feed, picture, console, job):
                job.obey(feed)
    except KeyboardInterrupt:
        return
    finally:
        feed.close()


class JobControl:
    """Ctrl-Z and ``fg``: the terminal is the shell's while this program stands still.

    Whoever draws looks at ``due`` between two pictures, leaves the screen and gives the keyboard's
    settings back, lets :meth:`obey` stop the process, and sets up again after it.

    Attributes:
        due: the process is to stop, or it goes on after somebody stopped it and may have changed
            the terminal.
    """

    def __init__(self) -> None:
        self.due = False
        self._stop = False
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> JobControl:
        """Listen to the signals, but not to Ctrl-Z where it was switched off."""
        for number in (signal.SIGTSTP, signal.SIGCONT):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        """Leave the signals as they were."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, _frame: object) -> None:
        self.due = True
        self._stop |= number == signal.SIGTSTP

    def obey(self, feed: StatusFeed) -> None:
        """Stop, if that is what is wanted; returns when the process is to go on.

        The service is not asked meanwhile: a new child begins afterwards, whose answers are new.
        """
        if self._stop:
            feed.close()
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            # The kernel passes over it where no shell is left that could let the process go on.
            os.kill(os.getpid(), signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, self._note)
        self.due = self._stop = False


def _first(feed: StatusFeed, console: Console, job: JobControl) -> Answer | None:
    """The first answer; None where the process is to stop before."""
    spinner = "line" if console.options.ascii_only else "dots"
    with console.status(Text("asking the service, Ctrl-C ends it"), spinner=spinner):
        while not job.due:
            _wait(feed, None)
            if (answer := feed.poll()) is not None:
                return answer
    return None


def _end(number: int, _frame: object) -> None:
    """Leave the terminal as it was, and no child behind."""
    sys.exit(128 + number)


def watch_command(
    address: str, connect: Callable[[], None], interval_s: float, *, feed: bool
) -> None:
    """``raywb watch``: on a terminal until it is ended, elsewhere one picture.

    Args:
        address: the cluster's.
        connect: connects this process to it.
        interval_s: how often the service is asked.
        feed: this process is the child that asks.

    Raises:
        RaywbError: there is no cluster or no service.
    """
    if feed:
        from raywb.lifecycle import status

        serve_statuses(connect, lambda timeout_s: status(timeout_s=timeout_s), interval_s)
        return
    console = Console()
    dumb = console.is_dumb_terminal
    if console.is_terminal and not dumb:
        watch(StatusFeed(feed_command(address, interval_s)), console, interval_s)
        return
    from raywb.lifecycle import status

    connect()
    answer = status()
    console.print(Encodable(Lines(lambda pen: frame_lines(answer, pen, None), time.time())))
    reason = "the output is no terminal"
    if dumb:
        reason = "TERM says that nothing can be drawn anew in this terminal (it is dumb or unknown)"
    Console(stderr=True).print(
        f"raywb: {reason}, so there is one picture; `raywb watch` in a terminal that can goes on, "
        "and `raywb status --json` is for programs",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _show(feed: StatusFeed, picture: Picture, console: Console, job: JobControl) -> bool:
    """Draw until it is to end; true where it is to go on after :meth:`JobControl.obey`."""
    with (
        _keys(sys.stdin) as keys,
        Screen(
            console=console, screen=True, auto_refresh=False, vertical_overflow="crop"
        ) as screen,
    ):
        drawn_s, size = 0.0, None
        while not job.due:
            answer = feed.poll()
            if answer is not None:
                picture.take(answer, time.time(), time.monotonic())
            due = time.monotonic() - drawn_s > REDRAW_S
            if answer is not None or due or console.size != size:
                drawn_s, size = time.monotonic(), console.size
                ascii_only = console.options.ascii_only
                there = keys is not None
                lines = picture.lines(*size, time.time(), ascii_only=ascii_only, keys=there)
                screen.update(Encodable(Group(*lines)), refresh=True)
            if _QUIT_KEYS & set(_wait(feed, keys)):
                return False
    return True


def _wait(feed: StatusFeed, keys: int | None) -> str:
    """Wait for news, for a key, or for a moment; returns the keys."""
    descriptors = [one for one in (feed.fileno(), keys) if one is not None]
    ready, _, _ = select.select(descriptors, [], [], TICK_S)
    if keys is None or keys not in ready:
        return ""
    # A terminal that is gone reads as its end.
    return os.read(keys, 64).decode(errors="replace") or "q"


@contextlib.contextmanager
def _keys(stdin: IO[str] | None) -> Iterator[int | None]:
    """The descriptor on which single keys arrive; None where no keyboard is."""
    if stdin is None:  # it was closed before the program began
        yield None
        return
    try:
        descriptor = stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        yield None
        return
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
