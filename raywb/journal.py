"""The worker's side of the log: append, read, acknowledge; no threads, no Ray.

One directory per source, that is per process::

    <base>/<source id>/lock                      held with flock for the life of the process
    <base>/<source id>/00000000000000000000.seg  frames; the name is the offset of the first byte
    <base>/<source id>/00000000000016777216.seg
    <base>/<source id>/losses                    what could not be kept, written in place
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
from pathlib import Path

from raywb.frozen import blobs_in
from raywb.rows import (
    HEADER,
    MARK,
    MAX_MESSAGE_BYTES,
    Counters,
    checksum,
    cut_behind_damage,
    encode,
    first_frame_is_whole,
    frame,
    holds_later_frame,
    last_whole_frame,
)

__all__ = ["Journal", "Segments", "new_source_id"]

#: Size at which a new segment is begun; acknowledged segments are deleted whole.
SEGMENT_BYTES = 16 * 1024 * 1024

#: Most that one process keeps on disk without an acknowledgement.
BACKLOG_CAP_BYTES = 4 * 1024 * 1024 * 1024

#: The losses are written over this page, which has its place on the disk from the beginning: they
#: are on disk also while it is full, and when the process is killed then.
LOSSES_BYTES = 4096
_pack_header = HEADER.pack
_write = os.write

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

    def read(self, offset: int, limit_bytes: int, *, final: bool = False) -> tuple[int, bytes]:
        """Read whole frames at ``offset``, at most about ``limit_bytes``.

        Args:
            offset: where to begin.
            limit_bytes: a frame longer than that is returned whole.
            final: nobody writes any more, so what is torn at the very end is damage too.

        Returns:
            The offset at which the bytes begin, later than the one asked for where that part is
            no longer on disk, and the bytes (empty at the end). Damage is returned like frames,
            for the service to count. A torn frame at the very end, which a process killed in
            the middle of a write leaves, is not returned, unless it is final.
        """
        starts = self.starts()
        for start in starts:
            begin = max(offset, start)
            with contextlib.suppress(FileNotFoundError), open(self.path(start), "rb") as file:
                if begin >= start + os.fstat(file.fileno()).st_size:
                    continue
                data = os.pread(file.fileno(), limit_bytes, begin - start)
                whole = last_whole_frame(data)
                if not whole:
                    complete = final or start != starts[-1]
                    data = _first_piece(file.fileno(), begin - start, limit_bytes, complete)
                    whole = len(data)
                if whole:
                    return begin, data[:whole]
        return offset, b""

    def delete_before(self, offset: int) -> None:
        """Delete the segments that end at or before ``offset``; the last one always stays."""
        starts = self.starts()
        for start, following in itertools.pairwise(starts):
            if following <= offset:
                self.path(start).unlink(missing_ok=True)


def _first_piece(fd: int, position: int, limit_bytes: int, complete: bool) -> bytes:
    """The frame at ``position``, which is longer than the limit, or damage up to the next one.

    Empty when it may be that the frame is being written: nothing whole comes behind it, and the
    segment is not ``complete``.
    """
    frame_bytes = HEADER.size + MAX_MESSAGE_BYTES
    data = os.pread(fd, max(frame_bytes, limit_bytes) + HEADER.size, position)
    if first_frame_is_whole(data):
        return data[: HEADER.size + HEADER.unpack_from(data)[1]]
    at_the_end = len(data) < frame_bytes
    if at_the_end and not complete and not holds_later_frame(data):
        return b""
    return data[: cut_behind_damage(data)]


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
        #: Why the last frame that was not written was not.
        self.last_reason = ""
        #: Rows that were written; with ``lost`` it is every row that came.
        self.rows = 0
        #: Everything before this offset is safe with the service.
        self.acknowledged = 0
        #: Everything before this offset has been forced to the service's disk.
        self.durable = 0
        self._segment_bytes = segment_bytes
        self._cap = backlog_cap_bytes
        self._disk_full = False
        # Re-entrant, so that a signal handler that logs cannot deadlock with the code that it
        # interrupted. Nothing is done under it but file operations on this machine.
        self._lock = threading.RLock()
        self._start = 0
        self._size = 0
        self._fd = self._lock_fd = self._losses_fd = -1
        self._make_directory(base)
        self.segments = Segments(self.directory)

    def _make_directory(self, base: Path) -> None:
        """Make the directory, locked and with its first segment; or leave nothing behind."""
        _make_base(base)
        hidden = base / f".{self.source_id}"
        hidden.mkdir(mode=0o700)
        try:
            self._lock_fd = os.open(hidden / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            self._losses_fd = _make_losses(hidden / "losses")
            self._fd = self._open_segment(hidden, 0)
            hidden.rename(self.directory)
        except BaseException:
            # It is tried again as long as the process lives: nothing may be left each time.
            self._let_go()
            # Not by rmtree, which needs descriptors: there may be none left.
            with contextlib.suppress(OSError):
                for name in ("lock", "losses", f"{0:020d}.seg"):
                    (hidden / name).unlink(missing_ok=True)
                hidden.rmdir()
            raise

    @staticmethod
    def _open_segment(directory: Path, start: int) -> int:
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        return os.open(directory / f"{start:020d}.seg", flags, 0o600)

    @property
    def end(self) -> int:
        """Offset after the last frame."""
        with self._lock:
            return self._start + self._written()

    def _written(self) -> int:
        """Size of the present segment. The file knows: an interrupt may come before we count."""
        return self._size if self.closed else os.fstat(self._fd).st_size

    @property
    def backlog_bytes(self) -> int:
        """Bytes that the service has not acknowledged."""
        return self.end - self.acknowledged

    @property
    def wants_room(self) -> bool:
        """Its disk was full, and what it holds there may be deleted as soon as it is durable."""
        return self._disk_full and self._size > 0 and not self.closed

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def append(self, payload: bytes, counted: bool = True) -> bool:
        """Append one message; True when it is in the kernel's hands, False when it is lost.

        Never raises: a full disk, a removed directory and a closed journal are losses by reason.

        Args:
            payload: an encoded message.
            counted: it is a row, whose loss counts.
        """
        data = _pack_header(MARK, len(payload), checksum(payload)) + payload
        lock = self._lock
        try:
            # A ``with`` takes twice as long. Inside the ``try``, since an interrupt may come as
            # soon as the lock is held.
            lock.acquire()
            if self._fd < 0:
                return self._lose("after_close", counted)
            if self._size >= self._segment_bytes and not self._roll():
                return self._lose("backlog_cap", counted)
            written = _write(self._fd, data)
            if written == len(data):
                self._size += written
                self.rows += counted
                return True
            os.ftruncate(self._fd, self._written() - written)
            return self._lose("disk_full", counted)
        except OSError as error:
            return self._lose(_reason(error), counted)
        finally:
            # Not ours when the wait for it was interrupted.
            try:  # noqa: SIM105 - suppress() would take a third of the time of all of this
                lock.release()
            except RuntimeError:
                pass

    def count_loss(self, reason: str) -> None:
        """Count a row that could not even be offered to ``append``."""
        with self._lock:
            self._lose(reason, counted=True)

    def _roll(self) -> bool:
        """Begin a new segment; False when the backlog has reached its cap."""
        start = self.end
        if start - self.acknowledged > self._cap:
            return False
        try:
            fd = self._open_segment(self.directory, start)
        except OSError:
            # The present segment grows on; if the disk is the trouble, the write that follows
            # meets it too and is counted there.
            return True
        full = self._fd
        try:
            self._fd, self._start, self._size = fd, start, 0
        finally:
            os.close(full)
        return True

    def _lose(self, reason: str, counted: bool) -> bool:
        self.last_reason = reason
        self._disk_full = self._disk_full or reason == "disk_full"
        if counted:
            self.lost[reason] = self.lost.get(reason, 0) + 1
            if self._losses_fd >= 0:
                with contextlib.suppress(OSError):  # they are also told by frames, later
                    os.pwrite(self._losses_fd, frame(encode(Counters(0, self.lost))), 0)
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
            if self.wants_room and self.durable >= self.end:
                # What fills the disk may be ours, and nobody needs it any more.
                self._roll()
                self._disk_full = False
            self.segments.delete_before(durable)

    def close(self, *, keep: bool = False) -> None:
        """Stop writing, and let go of the directory; remove it when all of it is home.

        Args:
            keep: leave it in any case, for a sweep: it holds losses that nobody was told of.
        """
        with self._lock:
            if self.closed:
                return
            done = self.durable >= self.end and not keep and not blobs_in(self.directory)
            self._size = self._written()
            if done:
                shutil.rmtree(self.directory, ignore_errors=True)
            self._let_go()

    def _let_go(self) -> None:
        """Close the descriptors, that of the lock last."""
        for fd in (self._fd, self._losses_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._losses_fd = self._lock_fd = -1

    def abandon_in_child(self) -> None:
        """Forget the files after a fork: they belong to the parent.

        The descriptors are closed, never unlocked: ``LOCK_UN`` in a child would free the parent.
        """
        self._lock = threading.RLock()
        self._let_go()


def _make_base(base: Path) -> None:
    """Make this user's own directory, and what is missing above it.

    It is called after the user, or lies in one that is. What is above is everybody's, as a temp
    directory is: whoever comes first must not shut the others out.

    Raises:
        OSError: it cannot be made, or another user has made it.
    """
    own = [base]
    if base.parent.name.endswith(f"-{os.getuid()}"):
        own = [base.parent, base]
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), own[0].parents))
    for parent in reversed(missing):
        with contextlib.suppress(FileExistsError):
            parent.mkdir()
            parent.chmod(0o1777)
    for path in own:
        path.mkdir(mode=0o700, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "another user has made it", str(path))


def _make_losses(path: Path) -> int:
    """Take the place for the losses; returns the descriptor."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    written = 0
    try:
        written = os.write(fd, bytes(LOSSES_BYTES))
    finally:
        if written < LOSSES_BYTES:
            os.close(fd)
    if written < LOSSES_BYTES:
        raise OSError(errno.ENOSPC, "the disk is full", str(path))
    return fd


def _reason(error: OSError) -> str:
    return "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "journal_error"
