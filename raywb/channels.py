"""The channels of one source: under which stage and rank its rows come, and who still uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from raywb.rows import Channel

__all__ = ["Channels", "OpenedChannel"]


class OpenedChannel(NamedTuple):
    """A channel that a client goes by from now on.

    Attributes:
        is_new: nobody has had it before.
        is_back: its end was said, and the other ranks of its stage wait for it again.
    """

    channel: Channel
    is_new: bool
    is_back: bool = False


class Channels:
    """The numbered channels of one process; not safe for threads, its owner holds a lock.

    Who asks for the same stage again gets the same channel, since a process may attach very
    often; each series has its own, and each client of a stage's own run.
    """

    def __init__(self) -> None:
        self._all: list[Channel] = []
        #: Clients of each channel that were not closed.
        self._clients: Counter[int] = Counter()
        #: Channels of stages' own runs whose clients were not closed.
        self._own_runs: set[int] = set()

    def __iter__(self) -> Iterator[Channel]:
        return iter(self._all)

    def __getitem__(self, number: int) -> Channel:
        return self._all[number]

    @property
    def open_own_runs(self) -> list[int]:
        """Channels of stages' own runs that nobody has closed, ascending."""
        return sorted(self._own_runs)

    def open(self, wanted: Channel) -> OpenedChannel:
        """The channel of a new client; ``wanted`` has any number."""
        shared = wanted.label is None and not wanted.run
        for known in self._all if shared else ():
            if known == msgspec.structs.replace(wanted, channel=known.channel):
                is_back = known.rank is not None and not self._clients[known.channel]
                self._clients[known.channel] += 1
                return OpenedChannel(known, is_new=False, is_back=is_back)
        channel = msgspec.structs.replace(wanted, channel=len(self._all))
        self._all.append(channel)
        self._clients[channel.channel] += 1
        if channel.run:
            self._own_runs.add(channel.channel)
        return OpenedChannel(channel, is_new=True)

    def leave(self, number: int) -> bool:
        """A client was closed: nothing more comes by its channel, or nothing for now.

        Returns:
            Whether anybody wants to know: the stage's own run, and the other ranks of a stage;
            these when the last client of the rank is closed.
        """
        left = self._clients[number] = max(self._clients[number] - 1, 0)
        is_last_of_rank = not left and self._all[number].rank is not None
        ends_run = number in self._own_runs
        self._own_runs.discard(number)
        return ends_run or is_last_of_rank

    def inherit(self) -> None:
        """After a fork in the child: it may log into a stage's own run, which its parent ends."""
        self._own_runs.clear()
        self._all = [msgspec.structs.replace(one, session=0) for one in self._all]
