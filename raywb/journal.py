"""The worker's side of the log: append, read, acknowledge, recover; no threads, no Ray.

One directory per source, that is per process::

    <base>/<source id>/lock                      held with flock for the life of the process
    <base>/<source id>/00000000000000000000.seg  frames; the name is the offset of the first byte
    <base>/<source id>/00000000000016777216.seg
    <base>/<source id>/blobs/                    frozen files of artifacts, see raywb.frozen

The directory is made under a dot-name, locked, and then renamed into view, so nobody ever sees
an unlocked directory of a living process. What ``append`` has written survives a SIGKILL of the
process, since it is in the kernel's page cache; it does not survive a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import secrets
import shutil
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

from raywb.frozen import blobs_in
from raywb.rows import HEADER, MARK, last_whole_frame

__all__ = ["FoundJournal", "Journal", "find_journals", "new_source_id"]

#: Size at which a new segment is begun; acknowledged segments are deleted whole.
SEGMENT_BYTES = 16 * 1024 * 1024

#: Most that one process keeps on disk without an acknowledgement.
BACKLOG_CAP_BYTES = 4 * 1024 * 1024 * 1024

_SOURCE_ID = re.compile(r"[0-9a-f]{32}")
_SEGMENT_NAME = re.compile(r"(\d{20})\.seg")


def new_source_id() -> str:
    """A random 128-bit name for a source, as 32 hex digits."""
    return secrets.token_hex(16)


class Segments:
    """Read access to the segment files of one journal directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def starts(self) -> list[int]:
        """Offsets at which the segments on disk begin, ascending."""
        found = (_SEGMENT_NAME.fullmatch(name) for name in os.listdir(self.directory))
        return sorted(int(match[1]) for match in found if match)

    def path(self, start: int) -> Path:
        return self.directory / f"{start:020d}.seg"

    def end(self) -> int:
        """Offset after the last byte on disk."""
        starts = self.starts()
        return starts[-1] + self.path(starts[-1]).stat().st_size if starts else 0

    def read(self, offset: int, limit_bytes: int) -> tuple[int, bytes]:
        """Read whole frames at ``offset``, at most about ``limit_bytes``.

        Returns:
            The offset at which the bytes begin, later than the one asked for where that part is
            no longer on disk, and the bytes (empty at the end). A frame longer than the limit is
            returned whole. A torn frame at the very end, which a process killed in the middle of
            a write leaves, is not returned.
        """
        for start in self.starts():
            path = self.path(start)
            begin = max(offset, start)
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                if begin >= start + os.fstat(file.fileno()).st_size:
                    continue
                data = os.pread(file.fileno(), limit_bytes, begin - start)
                whole = last_whole_frame(data)
                if whole == 0 and len(data) >= HEADER.size:
                    _, length, _ = HEADER.unpack_from(data)
                    data = os.pread(file.fileno(), HEADER.size + length, begin - start)
                    whole = last_whole_frame(data)
                if whole:
                    return begin, data[:whole]
        return offset, b""

    def delete_before(self, offset: int) -> None:
        """Delete the segments that end at or before ``offset``; the last one always stays."""
        starts = self.starts()
        for start, following in itertools.pairwise(starts):
            if following <= offset:
                self.path(start).unlink(missing_ok=True)


class Journal:
    """The append-only log of this process.

    Args:
        base: directory that holds the journals of this machine's processes of one cluster.
        source_id: 32 hex digits; a new one by default.
        segment_bytes: size at which a new segment begins.
        backlog_cap_bytes: most that is kept without an acknowledgement; beyond it appends are
            refused and counted under ``backlog_cap``.

    Raises:
        OSError: the directory cannot be made; the caller decides what to do without a journal.
    """

    def __init__(
        self,
        base: Path,
        source_id: str | None = None,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        backlog_cap_bytes: int = BACKLOG_CAP_BYTES,
    ) -> None:
        self.source_id = source_id or new_source_id()
        self.directory = base / self.source_id
        #: Frames that were not written, by reason; the sum of all is what this process lost.
        self.lost: dict[str, int] = {}
        #: Everything before this offset is safe with the service.
        self.acknowledged = 0
        #: Everything before this offset has been forced to the service's disk.
        self.durable = 0
        self._segment_bytes = segment_bytes
        self._cap = backlog_cap_bytes
        # Re-entrant, so that a signal handler that logs cannot deadlock with the code that it
        # interrupted. Nothing is done under it but file operations on this machine.
        self._lock = threading.RLock()
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        hidden = base / f".{self.source_id}"
        hidden.mkdir(mode=0o700)
        self._lock_fd = os.open(hidden / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        self._start = 0
        self._size = 0
        self._fd = self._open_segment(hidden, 0)
        hidden.rename(self.directory)
        self.segments = Segments(self.directory)

    @staticmethod
    def _open_segment(directory: Path, start: int) -> int:
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        return os.open(directory / f"{start:020d}.seg", flags, 0o600)

    @property
    def end(self) -> int:
        """Offset after the last frame."""
        with self._lock:
            return self._start + self._size

    @property
    def backlog_bytes(self) -> int:
        """Bytes that the service has not acknowledged."""
        return self.end - self.acknowledged

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def append(self, payload: bytes, *, counted: bool = True) -> bool:
        """Append one message; True when it is in the kernel's hands, False when it is lost.

        Never raises: a full disk, a removed directory and a closed journal are losses by reason.

        Args:
            payload: an encoded message.
            counted: it is a row, whose loss counts.
        """
        data = HEADER.pack(MARK, len(payload), zlib.crc32(payload)) + payload
        with self._lock:
            if self._fd < 0:
                return self._lose("after_close", counted)
            if self._size >= self._segment_bytes and not self._roll():
                return self._lose("backlog_cap", counted)
            try:
                written = os.write(self._fd, data)
            except OSError as error:
                return self._lose(_reason(error), counted)
            if written != len(data):
                os.ftruncate(self._fd, self._size)
                return self._lose("disk_full", counted)
            self._size += written
            return True

    def _roll(self) -> bool:
        """Begin a new segment; False when the backlog has reached its cap."""
        start = self._start + self._size
        if start - self.acknowledged > self._cap:
            return False
        try:
            fd = self._open_segment(self.directory, start)
        except OSError:
            # The present segment grows on; if the disk is the trouble, the write that follows
            # meets it too and is counted there.
            return True
        os.close(self._fd)
        self._fd, self._start, self._size = fd, start, 0
        return True

    def _lose(self, reason: str, counted: bool) -> bool:
        if counted:
            self.lost[reason] = self.lost.get(reason, 0) + 1
        return False

    def acknowledge(self, offset: int, durable: int) -> None:
        """Note how far the service has come.

        Args:
            offset: the service has received everything before it.
            durable: what lies before it need not be kept here any more.
        """
        with self._lock:
            if self.closed:
                return
            self.acknowledged = max(self.acknowledged, min(offset, self.end))
            self.durable = max(self.durable, min(durable, self.end))
            self.segments.delete_before(durable)

    def close(self) -> None:
        """Stop writing, and let go of the directory; remove it when all of it is home."""
        with self._lock:
            if self.closed:
                return
            done = self.durable >= self.end and not blobs_in(self.directory)
            os.close(self._fd)
            self._fd = -1
            if done:
                shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock_fd)

    def abandon_in_child(self) -> None:
        """Forget the files after a fork: they belong to the parent.

        The descriptors are closed, never unlocked: ``LOCK_UN`` in a child would free the parent.
        """
        self._lock = threading.RLock()
        if not self.closed:
            os.close(self._fd)
            os.close(self._lock_fd)
            self._fd = -1


def _reason(error: OSError) -> str:
    return "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "journal_error"


class FoundJournal:
    """A journal of this machine seen from outside its process.

    Attributes:
        is_free: its process is gone, and we hold its lock for the time of bringing it home.
    """

    def __init__(self, directory: Path, lock_fd: int | None) -> None:
        self.source_id = directory.name
        self.directory = directory
        self.segments = Segments(directory)
        self._lock_fd = lock_fd

    @property
    def is_free(self) -> bool:
        return self._lock_fd is not None

    def release(self, *, delete: bool = False) -> None:
        """Unlock; with ``delete`` remove the directory first, all of it being delivered."""
        if self._lock_fd is not None:
            if delete:
                shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock_fd)


def find_journals(base: Path) -> Iterator[FoundJournal]:
    """Yield the journals under ``base``, those of dead processes locked by us.

    The caller releases each one before it asks for the next.
    """
    try:
        names = sorted(os.listdir(base))
    except FileNotFoundError:
        return
    for name in names:
        if not _SOURCE_ID.fullmatch(name):
            continue
        try:
            lock_fd = os.open(base / name / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its process ended in good order a moment ago
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            yield FoundJournal(base / name, None)
            continue
        if os.fstat(lock_fd).st_nlink:
            yield FoundJournal(base / name, lock_fd)
        else:
            os.close(lock_fd)
