"""An append-only file of records, in segments: what the ledger and the outbox are written on.

A record is a header (mark, length, CRC-32) and its bytes. Positions are counted over all
segments, and a segment's file name is the position of its first byte. Reading never stops at
damage: a record that fails its checksum is counted, and the search goes on at the next one that is
whole; who can make something of the damaged bytes is given them. Only what is torn at the very
end, where a killed process stopped writing, is cut off when the log is opened.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "AppendLog",
    "Damage",
    "Record",
    "Segment",
    "is_undamaged",
    "record_bounds",
    "sync_and_close",
]

#: Size at which a new segment begins.
SEGMENT_BYTES = 64 * 1024 * 1024

#: How many bytes may be check-summed in search of the next whole record after damage. It bounds
#: the work that bytes which look like records can cause.
RESYNC_BUDGET_BYTES = 1024 * 1024 * 1024

_HEADER = struct.Struct("<4sII")
_MARK = b"RWL1"
_SEGMENT_NAME = re.compile(r"(\d{20})\.log")


class Record(NamedTuple):
    """A record and the position after it, from which reading goes on."""

    next_position: int
    data: bytes


class Damage(NamedTuple):
    """A stretch that holds no whole record, headers and all, and the position after it."""

    next_position: int
    data: bytes


class Segment(NamedTuple):
    """A file of the log: the position at which it begins, and how much of it belongs to the log."""

    start: int
    size: int
    path: Path


class AppendLog:
    """Append records, and read them from any position that an earlier read returned.

    Args:
        directory: where the segments lie.
        segment_bytes: size at which a new one begins.
        is_complete: says of the bytes behind the last whole record whether they are a damaged
            record, which is kept, or a torn one, which is cut off.
        read_only: change nothing, since somebody else may be writing; the log ends where it
            ended at this moment.

    Raises:
        OSError: the directory cannot be made or read, or a write fails. A write that fails
            leaves the log as it was.
    """

    def __init__(
        self,
        directory: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        is_complete: Callable[[bytes], bool] = lambda _: False,
        read_only: bool = False,
    ) -> None:
        self.directory = directory
        self._damage: set[int] = set()
        #: Bytes of an unfinished record that were cut off its end when it was opened.
        self.torn_bytes = 0
        self._segment_bytes = segment_bytes
        self._dirty = False
        if read_only:
            self._fd = -1
            self._start = self._starts()[-1]
            with open(self._path(self._start), "rb") as file:
                self._size = _end_of_last_record(file.fileno())
            return
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        starts = self._starts()
        self._start = starts[-1] if starts else 0
        self._fd = self._open(self._start)
        try:
            self._size = os.fstat(self._fd).st_size
            self._dirty = True
            whole_end = _end_of_last_record(self._fd)
            if whole_end < self._size:
                tail = os.pread(self._fd, self._size - whole_end, whole_end)
                if is_complete(tail):
                    self._roll()  # behind damage, so that what comes now is found
                else:
                    self.torn_bytes = len(tail)
                    os.ftruncate(self._fd, whole_end)
                    self._size = whole_end
            # What an earlier process wrote and did not sync counts as durable from here on.
            self.sync()
        except OSError:
            os.close(self._fd)
            raise

    @property
    def damaged(self) -> int:
        """Stretches, among those that were read so far, that hold no whole record."""
        return len(self._damage)

    def _path(self, start: int) -> Path:
        return self.directory / f"{start:020d}.log"

    def _open(self, start: int) -> int:
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        return os.open(self._path(start), flags, 0o600)

    def _starts(self) -> list[int]:
        names = (_SEGMENT_NAME.fullmatch(name) for name in os.listdir(self.directory))
        return sorted(int(match[1]) for match in names if match)

    def refresh(self) -> None:
        """Of a log that was opened read-only: it ends where it ends by now.

        Raises:
            OSError: it cannot be read any more.
        """
        start = self._starts()[-1]
        if start != self._start:
            self._start, self._size = start, 0
        with open(self._path(start), "rb") as file:
            self._size = _end_of_last_record(file.fileno(), self._size)

    @property
    def end(self) -> int:
        """Position after the last record."""
        return self._start + self._size

    def append(self, *parts: bytes) -> int:
        """Append one record made of ``parts``; returns the position after it."""
        length = sum(map(len, parts))
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        if self._size >= self._segment_bytes:
            self._roll()
        header = _HEADER.pack(_MARK, length, crc)
        written = os.writev(self._fd, [header, *parts])
        if written != len(header) + length:
            os.ftruncate(self._fd, self._size)
            raise OSError(errno.ENOSPC, "the disk is full", str(self._path(self._start)))
        self._size += written
        self._dirty = True
        return self.end

    def skip_to(self, position: int) -> None:
        """Go on at this position, if the log ends before it; what lies between is nothing."""
        if self.end < position:
            self._roll(position)

    def _roll(self, following: int | None = None) -> None:
        following = self.end if following is None else following
        fd = self._open(following)
        try:
            self.sync()
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._start, self._size = fd, following, 0

    def sync(self) -> None:
        """Force what was appended to the disk itself."""
        fd = self.unsynced()
        if fd is not None:
            try:
                sync_and_close(fd)
            except OSError:
                self.not_synced()
                raise

    def unsynced(self) -> int | None:
        """A descriptor for :func:`sync_and_close` when something was appended since the last one.

        It is a duplicate, so another thread may sync while this log goes on, even into a new
        segment.
        """
        if not self._dirty:
            return None
        fd = os.dup(self._fd)
        self._dirty = False
        return fd

    def not_synced(self) -> None:
        """The sync that :meth:`unsynced` began has failed: the next one is to try again."""
        self._dirty = True

    def close(self) -> None:
        """Sync and close; reading and appending are over."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def read(self, position: int) -> Iterator[Record]:
        """Yield the records from ``position`` to the end as it is at the start of the call."""
        return (piece for piece in self.read_all(position) if isinstance(piece, Record))

    def segments(self, position: int) -> Iterator[Segment]:
        """Yield the files that hold what lies behind ``position``, as far as the log goes now."""
        end = self.end
        for start in self._starts():
            path = self._path(start)
            size = min(path.stat().st_size, end - start)
            if start + size > position and size > 0:
                yield Segment(start, size, path)

    def read_all(self, position: int) -> Iterator[Record | Damage]:
        """Yield the records, as :meth:`read` does, and what is damaged between them."""
        for start, size, path in self.segments(position):
            with (
                open(path, "rb") as file,
                mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view,
            ):
                offset = max(position - start, 0)
                while offset < size:
                    length = _whole_record(view, offset)
                    if length is None:
                        self._damage.add(start + offset)
                        begin, offset = offset, _next_record(view, offset + 1)
                        yield Damage(start + offset, view[begin:offset])
                        continue
                    begin = offset + _HEADER.size
                    offset = begin + length
                    yield Record(start + offset, view[begin:offset])


def _end_of_last_record(fd: int, offset: int = 0) -> int:
    """Where the last whole record ends; those before ``offset`` are known to be whole."""
    size = os.fstat(fd).st_size
    if size <= offset:
        return offset
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as view:
        whole_end = offset
        while offset < size:
            length = _whole_record(view, offset)
            if length is None:
                offset = _next_record(view, offset + 1)
            else:
                offset += _HEADER.size + length
                whole_end = offset
    return whole_end


def sync_and_close(fd: int) -> None:
    """Force a file to the disk itself, and close the descriptor."""
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def record_bounds(view: memoryview, offset: int) -> tuple[int, int] | None:
    """Where the data of the record at ``offset`` begin and end.

    Returns:
        None when its header is not whole, or is none. Its data may go beyond the view, and are to
        be checked with :func:`is_undamaged`.
    """
    if offset + _HEADER.size > len(view):
        return None
    mark, length, _ = _HEADER.unpack_from(view, offset)
    begin = offset + _HEADER.size
    return (begin, begin + length) if mark == _MARK else None


def is_undamaged(view: memoryview, begin: int, end: int) -> bool:
    """Whether the data of a record have the checksum that stands in its header before them."""
    crc: int = _HEADER.unpack_from(view, begin - _HEADER.size)[2]
    return zlib.crc32(view[begin:end]) == crc


def _whole_record(view: mmap.mmap, offset: int) -> int | None:
    """Length of the record whose header is at ``offset``; None when it is not whole."""
    if offset + _HEADER.size > len(view):
        return None
    mark, length, crc = _HEADER.unpack_from(view, offset)
    begin = offset + _HEADER.size
    if mark != _MARK or begin + length > len(view):
        return None
    return length if zlib.crc32(view[begin : begin + length]) == crc else None


def _next_record(view: mmap.mmap, offset: int) -> int:
    """Offset of the next whole record at or after ``offset``, or the end."""
    budget = RESYNC_BUDGET_BYTES
    while budget > 0 and (offset := view.find(_MARK, offset)) >= 0:
        if _whole_record(view, offset) is not None:
            return offset
        if offset + _HEADER.size <= len(view):
            length = _HEADER.unpack_from(view, offset)[1]
            budget -= length if offset + length <= len(view) else 0
        offset += 1
    return len(view)
