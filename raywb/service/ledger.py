"""Everything received, once, durable: the service's copy of all journals.

An entry is a source's id, the offset of its first byte in that source's journal, and the bytes.
The ledger accepts only what begins where it ends for that source, so a request that is repeated,
late or out of order changes nothing.

Whose bytes they are stands before them and once more behind them, each with a checksum of its
own. So a damaged byte costs the frame that it hit, not the whole entry: the frames in it have
their own checksums, and what is left of them is used.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from raywb.service.append_log import SEGMENT_BYTES, AppendLog, Record, sync_and_close

__all__ = ["Entry", "Ledger", "Sync"]

#: A mark, the source, the offset, how many bytes, and the checksum of these four.
_ENTRY = struct.Struct("<4s16sQII")
_HEAD, _TAIL = b"RWEH", b"RWET"
_MARKS = re.compile(_HEAD + b"|" + _TAIL)


def _edge(mark: bytes, source: bytes, offset: int, length: int) -> bytes:
    crc = zlib.crc32(_ENTRY.pack(mark, source, offset, length, 0))
    return _ENTRY.pack(mark, source, offset, length, crc)


class _Edge(NamedTuple):
    """What stands before or behind an entry's bytes: whose they are, and where they lie."""

    source_id: str
    offset: int
    begin: int
    end: int


def _edge_at(data: bytes, position: int) -> _Edge | None:
    """The edge at a position of a buffer, if its checksum holds and its bytes are there."""
    if not 0 <= position <= len(data) - _ENTRY.size:
        return None
    mark, source, offset, length, crc = _ENTRY.unpack_from(data, position)
    if crc != zlib.crc32(_ENTRY.pack(mark, source, offset, length, 0)):
        return None
    if mark == _HEAD:
        begin = position + _ENTRY.size
        # A torn entry lacks its end, and nobody was told that it had been taken.
        is_there = begin + length + _ENTRY.size <= len(data)
    else:
        begin = position - length
        is_there = begin >= 0
    return _Edge(source.hex(), offset, begin, begin + length) if is_there else None


def _salvage(data: bytes) -> list[_Edge]:
    """The entries in a damaged stretch, in order: each has one of its two edges left."""
    found: list[_Edge] = []
    position = 0
    for mark in _MARKS.finditer(data):
        edge = _edge_at(data, mark.start()) if mark.start() >= position else None
        if edge is not None and edge.begin >= position:
            found.append(edge)
            position = edge.end + _ENTRY.size
    return found


class Entry(NamedTuple):
    """Bytes of one source's journal, and the ledger position after them."""

    next_position: int
    source_id: str
    offset: int
    data: bytes


class Sync(NamedTuple):
    """A sync under way: the descriptor to sync (None: nothing to do), and what it covers."""

    fd: int | None
    ends: dict[str, int]


def _ignore(source_id: str, offset: int, data: bytes) -> None:
    pass


class Ledger:
    """Append-only entries, and where each source ends.

    Args:
        directory: where the entries lie.
        segment_bytes: size at which a new file begins.
        observe: called with each entry's source, offset and bytes, also with those that were
            there before.

    Raises:
        OSError: the directory cannot be made or read, or a write fails.
    """

    def __init__(
        self,
        directory: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        observe: Callable[[str, int, bytes], None] = _ignore,
    ) -> None:
        self._observe = observe
        self._log = AppendLog(
            directory, segment_bytes=segment_bytes, is_complete=lambda tail: bool(_salvage(tail))
        )
        self._unreadable: set[int] = set()
        self._ends: dict[str, int] = {}
        self._durable: dict[str, int] = {}
        #: Bytes that a source no longer had when they were asked for, by source.
        self.missing_bytes: dict[str, int] = {}
        for entry in self.read(0):
            self._note(entry.source_id, entry.offset, entry.data)
        self._durable = dict(self._ends)
        self._unsynced: set[str] = set()

    def _note(self, source_id: str, offset: int, data: bytes) -> None:
        gap = offset - self._ends.get(source_id, 0)
        if gap > 0:
            self.missing_bytes[source_id] = self.missing_bytes.get(source_id, 0) + gap
        self._ends[source_id] = offset + len(data)
        self._observe(source_id, offset, data)

    @property
    def end(self) -> int:
        """Position after the last entry."""
        return self._log.end

    @property
    def damaged(self) -> int:
        """Stretches of the ledger that are damaged, whether something was left in them or not."""
        return self._log.damaged

    @property
    def unreadable(self) -> int:
        """Damaged stretches in which nothing was left."""
        return len(self._unreadable)

    @property
    def torn_bytes(self) -> int:
        """See :class:`AppendLog`."""
        return self._log.torn_bytes

    def end_of(self, source_id: str) -> int:
        """Offset up to which this source's journal is here."""
        return self._ends.get(source_id, 0)

    def append(self, source_id: str, offset: int, data: bytes, *, after_gap: bool = False) -> int:
        """Take the bytes when they begin where the source ends; returns where it ends now.

        Args:
            source_id: 32 hex digits.
            offset: where ``data`` begins in the source's journal.
            data: whole frames.
            after_gap: the source no longer has what lies before ``offset``; it is counted as
                missing, and the source goes on there.
        """
        end = self.end_of(source_id)
        if offset < end or (offset > end and not after_gap) or not data:
            return end
        source = bytes.fromhex(source_id)
        edges = [_edge(mark, source, offset, len(data)) for mark in (_HEAD, _TAIL)]
        self._log.append(edges[0], data, edges[1])
        self._note(source_id, offset, data)
        self._unsynced.add(source_id)
        return self._ends[source_id]

    def skip_to(self, position: int) -> None:
        """Make sure that what comes from now on lies behind a position that was consumed."""
        self._log.skip_to(position)

    def read(self, position: int) -> Iterator[Entry]:
        """Yield the entries from ``position`` on, also what damage has left of one."""
        for piece in self._log.read_all(position):
            edge = _edge_at(piece.data, 0) if isinstance(piece, Record) else None
            edges = [edge] if edge is not None else _salvage(piece.data)
            if not edges:
                self._unreadable.add(piece.next_position)
            for edge in edges:
                data = piece.data[edge.begin : edge.end]
                yield Entry(piece.next_position, edge.source_id, edge.offset, data)

    def durable_end_of(self, source_id: str) -> int:
        """Offset up to which this source's journal has been forced to the disk itself."""
        return self._durable.get(source_id, 0)

    def begin_sync(self) -> Sync:
        """What has to be synced now; carry it out in any thread, then call :meth:`end_sync`."""
        fd = self._log.unsynced()
        ends = {source_id: self._ends[source_id] for source_id in self._unsynced}
        self._unsynced.clear()
        return Sync(fd, ends)

    def end_sync(self, sync: Sync) -> None:
        """The sync was carried out: what it covered may be deleted at the source."""
        self._durable.update(sync.ends)

    def sync_failed(self, sync: Sync) -> None:
        """The sync failed: the next one covers what this one was to cover."""
        self._unsynced.update(sync.ends)
        self._log.not_synced()

    def sync(self) -> None:
        """Force what was appended to the disk itself, at once."""
        sync = self.begin_sync()
        try:
            if sync.fd is not None:
                sync_and_close(sync.fd)
        except OSError:
            self.sync_failed(sync)
            raise
        self.end_sync(sync)

    def close(self) -> None:
        """Sync and close."""
        self._log.close()
