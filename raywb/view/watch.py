"""``raywb watch``: the picture of a run that renews itself, until q or Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.text import Text

from raywb.reports import Status
from raywb.view.delivery import Pace
from raywb.view.drawing import DIM, Lines, Pen, duration
from raywb.view.frame import frame_lines
from raywb.view.status_feed import Answer, StatusFeed, feed_command, serve_statuses

__all__ = ["watch", "watch_command"]

#: How soon a key, and another size of the window, are noticed, in seconds.
TICK_S = 0.2

#: The clock, and how long ago things were, go on so often while there is no news, in seconds.
REDRAW_S = 1.0

_QUIT_KEYS = frozenset("qQ\x03\x04")


class Picture:
    """What is to be shown: the newest status, and what has come between."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._status: Status | None = None
        self._pace = Pace()
        self._told_s = 0.0
        self._trouble: str | None = None
        self._since_s = 0.0

    def take(self, answer: Answer) -> None:
        """Take in what the feed says."""
        if answer.status is not None:
            self._status, self._trouble, self._told_s = answer.status, None, time.time()
            self._pace.note(answer.status, time.monotonic())
        elif answer.trouble is not None:
            self._since_s = self._since_s if self._trouble else time.time()
            self._trouble = answer.trouble

    def lines(self, console: Console) -> list[Text]:
        """The picture for a console of the present size."""
        now_s = time.time()
        width, height = console.size
        pen = Pen(width, now_s, console.options.ascii_only)
        if self._status is None:
            return [Text("raywb: asking the service ...", DIM)]
        dot = f" {pen.sign('·', '|')} "
        foot = Text(f"q quits{dot}every {self._interval_s:g} s{dot}", DIM)
        foot.append(f"raywb {self._status.version}")
        trouble: Sequence[str] = ()
        if self._trouble is not None:
            old = duration(now_s - self._told_s)
            trouble = (
                f"no answer since {_clock(self._since_s)}, shown is what was {old} ago; "
                f"trying again ({self._trouble})",
            )
        return frame_lines(self._status, pen, height, pace=self._pace, trouble=trouble, foot=foot)


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
    try:
        answer = None
        with console.status(Text("asking the service, Ctrl-C ends it")):
            while answer is None:
                _wait(feed, None)
                answer = feed.poll()
        answer.raise_trouble()
        picture = Picture(interval_s)
        picture.take(answer)
        _show(feed, picture, console)
    except KeyboardInterrupt:
        return
    finally:
        feed.close()


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
    if console.is_terminal and not console.is_dumb_terminal:
        watch(StatusFeed(feed_command(address, interval_s)), console, interval_s)
        return
    from raywb.lifecycle import status

    connect()
    answer = status()
    console.print(Lines(lambda pen: frame_lines(answer, pen, None), time.time()))
    Console(stderr=True).print(
        "raywb: this is no terminal, so there is one picture; `raywb watch` in a terminal goes "
        "on, and `raywb status --json` is for programs",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _show(feed: StatusFeed, picture: Picture, console: Console) -> None:
    with (
        _keys(sys.stdin) as keys,
        Screen(
            console=console, screen=True, auto_refresh=False, vertical_overflow="crop"
        ) as screen,
    ):
        drawn_s, size = 0.0, None
        while True:
            answer = feed.poll()
            if answer is not None:
                picture.take(answer)
            due = time.monotonic() - drawn_s > REDRAW_S
            if answer is not None or due or console.size != size:
                drawn_s, size = time.monotonic(), console.size
                lines = picture.lines(console)
                screen.update(Group(*lines), refresh=True)
            if _QUIT_KEYS & set(_wait(feed, keys)):
                return


def _wait(feed: StatusFeed, keys: int | None) -> str:
    """Wait for news, for a key, or for a moment; returns the keys."""
    descriptors = [one for one in (feed.fileno(), keys) if one is not None]
    ready, _, _ = select.select(descriptors, [], [], TICK_S)
    if keys is None or keys not in ready:
        return ""
    return os.read(keys, 64).decode(errors="replace")


@contextlib.contextmanager
def _keys(stdin: IO[str]) -> Iterator[int | None]:
    """The descriptor on which single keys arrive; None where no keyboard is."""
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
