"""Which sources still owe something: heard lately, silent, ended, or out of reach.

A source is open from its announcement, or its first bytes, until the last that the ledger has of
it is an :class:`raywb.rows.End`, its own or one written in its place. An open source says every
now and then that it lives. One that does not is silent: killed, hung, cut off, or lost with its
node, and a sweep of its node tells which.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable

from raywb.errors import FrameError
from raywb.reports import SweepReport
from raywb.rows import Frame, Hello, decode, end_of_source, scan

__all__ = ["Liveness", "Presence"]


@dataclasses.dataclass(slots=True)
class Presence:
    """An open source.

    Attributes:
        node_id: where it lives; empty when that cannot be known.
        heard_at: when it spoke last, or became known, on the monotonic clock.
        rows: how many rows it had logged by then, if it said so.
        quiet: it had nothing new then, and all of it was here.
        unconfirmed: why its journal cannot be had; None while nothing speaks against it.
    """

    node_id: str
    heard_at: float
    rows: int | None = None
    quiet: bool = False
    unconfirmed: str | None = None


class Liveness:
    """Every source, as far as it matters whether it is still there.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: Where each source lives that ever sent a byte.
        self._node_of: dict[str, str] = {}
        #: Sources without an end.
        self.open: dict[str, Presence] = {}
        #: Sources whose end was written in their place.
        self.killed: set[str] = set()
        self._settled: set[str] = set()

    def announce(self, source_id: str, node_id: str) -> None:
        """A process is about to write as this source; nothing of it need ever arrive."""
        if source_id not in self._node_of and source_id not in self.open:
            self.open[source_id] = Presence(sys.intern(node_id), self._clock())

    def note(self, source_id: str, offset: int, data: bytes) -> None:
        """Take notice of bytes that the ledger has, in their order."""
        if source_id not in self._node_of:
            announced = self.open.get(source_id)
            known = announced.node_id if announced else ""
            self._node_of[source_id] = sys.intern((not offset and _node_in(data)) or known)
        end = end_of_source(data)
        if end is None:
            if source_id not in self.open:
                self.open[source_id] = Presence(self._node_of[source_id], self._clock())
            return
        self.open.pop(source_id, None)
        if end.killed:
            self.killed.add(source_id)

    def hear(self, source_id: str, rows: int, *, quiet: bool) -> None:
        """The source itself spoke."""
        if (presence := self.open.get(source_id)) is not None:
            presence.heard_at = self._clock()
            presence.rows = rows
            presence.quiet = quiet
            presence.unconfirmed = None
            self._settled.discard(source_id)

    def settle(self, source_ids: Iterable[str]) -> None:
        """A run's report has named these as unconfirmed: no later one does, unless they speak."""
        self._settled.update(source_ids)

    def has_ended(self, source_id: str) -> bool:
        """Whether the last that is known of a source is its end."""
        return source_id in self._node_of and source_id not in self.open

    @property
    def outstanding(self) -> dict[str, set[str]]:
        """The open sources of each node."""
        nodes: dict[str, set[str]] = {}
        for source_id, presence in self.open.items():
            nodes.setdefault(presence.node_id, set()).add(source_id)
        return nodes

    def unattended(self, silence_s: float) -> dict[str, set[str]]:
        """Nodes with a silent source and no live one, which would have looked after it.

        Args:
            silence_s: a source that was not heard for longer is silent.
        """
        latest = self._clock() - silence_s
        return {
            node_id: source_ids
            for node_id, source_ids in self.outstanding.items()
            if all(self.open[source_id].heard_at < latest for source_id in source_ids)
        }

    @property
    def unconfirmed(self) -> dict[str, Presence]:
        """Sources that fell silent, and whose journal cannot be had."""
        return {
            source_id: presence
            for source_id, presence in self.open.items()
            if presence.unconfirmed is not None and source_id not in self._settled
        }

    def judge(self, source_ids: Iterable[str], swept: SweepReport, since: float) -> None:
        """Say of sources whose nodes were swept whether their journals can be had.

        Args:
            source_ids: those that were open before the sweep.
            swept: what it found.
            since: a source that spoke after this moment of the monotonic clock is alive, though
                its journal may lie where no sweep sees it; unless its node is known to be gone.
        """
        alive = set(swept.alive)
        for source_id in source_ids:
            presence = self.open.get(source_id)
            if presence is None:
                continue  # it is home
            if source_id in alive:
                presence.unconfirmed = None
            elif presence.node_id in swept.gone:
                presence.unconfirmed = "its node is gone"
            elif presence.heard_at >= since:
                presence.unconfirmed = None
            elif source_id in swept.failed:
                presence.unconfirmed = f"its journal is not home: {swept.failed[source_id]}"
            elif presence.node_id in swept.unreached:
                presence.unconfirmed = "its node did not answer in time"
            else:
                presence.unconfirmed = "its journal was found nowhere on its node"


def _node_in(data: bytes) -> str:
    """The node that the first frame of a journal names; empty when the frame is damaged."""
    first = next(iter(scan(data)), None)
    if not isinstance(first, Frame):
        return ""
    try:
        hello = decode(first.payload)
    except FrameError:
        return ""  # the merge counts it
    return hello.node_id if isinstance(hello, Hello) else ""
