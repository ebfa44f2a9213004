"""Everything received, once, durable: the service's copy of all journals.

An entry is a source's id, the offset of its first byte in that source's journal, and the bytes.
The ledger accepts only what begins where it ends for that source, so a request that is repeated,
late or out of order changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from raywb.service.append_log import SEGMENT_BYTES, AppendLog, sync_and_close

__all__ = ["Entry", "Ledger", "Sync"]

_ENTRY = struct.Struct("<16sQ")


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


class Ledger:
    """Append-only entries, and where each source ends.

    Raises:
        OSError: the directory cannot be made or read, or a write fails.
    """

    def __init__(self, directory: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._log = AppendLog(directory, segment_bytes=segment_bytes)
        self._ends: dict[str, int] = {}
        self._durable: dict[str, int] = {}
        #: Bytes that a source no longer had when they were asked for, by source.
        self.missing_bytes: dict[str, int] = {}
        for entry in self.read(0):
            self._note(entry.source_id, entry.offset, len(entry.data))
        self._durable = dict(self._ends)
        self._unsynced: set[str] = set()

    def _note(self, source_id: str, offset: int, length: int) -> None:
        gap = offset - self._ends.get(source_id, 0)
        if gap > 0:
            self.missing_bytes[source_id] = self.missing_bytes.get(source_id, 0) + gap
        self._ends[source_id] = offset + length

    @property
    def end(self) -> int:
        """Position after the last entry."""
        return self._log.end

    @property
    def damaged(self) -> int:
        """Stretches of the ledger that could not be read."""
        return self._log.damaged

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
        self._log.append(_ENTRY.pack(bytes.fromhex(source_id), offset), data)
        self._note(source_id, offset, len(data))
        self._unsynced.add(source_id)
        return self._ends[source_id]

    def read(self, position: int) -> Iterator[Entry]:
        """Yield the entries from ``position`` on."""
        for next_position, record in self._log.read(position):
            source, offset = _ENTRY.unpack_from(record)
            yield Entry(next_position, source.hex(), offset, record[_ENTRY.size :])

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

    def sync(self) -> None:
        """Force what was appended to the disk itself, at once."""
        sync = self.begin_sync()
        if sync.fd is not None:
            sync_and_close(sync.fd)
        self.end_sync(sync)

    def close(self) -> None:
        """Sync and close."""
        self._log.close()
