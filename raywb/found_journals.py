"""Journals that lie on this machine: who finds them, and whose process is gone.

A journal whose lock is free belongs to a dead process: the normal end of a killed worker. Whoever
finds it holds the lock while he brings it home.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Container, Iterator
from pathlib import Path

from raywb.journal import Segments
from raywb.rows import Frame, frame, scan

__all__ = ["FoundJournal", "find_journals", "sole_sweeper"]

_SOURCE_ID = re.compile(r"[0-9a-f]{32}")


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
        self._pid = os.getpid()

    @property
    def is_free(self) -> bool:
        return self._lock_fd is not None

    def losses(self) -> bytes:
        """The frame that says what its process could not keep; empty when nothing was lost."""
        try:
            found = next(scan((self.directory / "losses").read_bytes()), None)
        except FileNotFoundError:
            return b""
        return frame(bytes(found.payload)) if isinstance(found, Frame) else b""

    def release(self, *, delete: bool = False) -> None:
        """Unlock; with ``delete`` remove the directory first, all of it being delivered."""
        if self._lock_fd is not None:
            if delete:
                shutil.rmtree(self.directory, ignore_errors=True)
            _unlock(self._lock_fd, self._pid)


def _unlock(fd: int, pid: int) -> None:
    """Unlock and close, in the process ``pid``.

    A child that was forked meanwhile has the descriptor too: that neither keeps the lock, nor does
    the child free it, which only closes what it inherited.
    """
    if os.getpid() == pid:
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


@contextlib.contextmanager
def sole_sweeper(base: Path, interval_s: float) -> Iterator[bool]:
    """Say whether to sweep ``base`` now: nobody else does, and nobody did within ``interval_s``.

    Of all processes of a machine that ask, one at a time is told to.

    Raises:
        OSError: the directory is there, but cannot be written to.
    """
    try:
        fd = os.open(base / ".sweep", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        yield False  # nobody ever had a journal here
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        yield False
        return
    pid = os.getpid()
    try:
        found = os.fstat(fd)
        # A file that was just made has no content; a clock that was set back must not stop us.
        due = found.st_size == 0 or abs(time.time() - found.st_mtime) >= interval_s
        if due:
            os.pwrite(fd, b"%d" % os.getpid(), 0)
        yield due
    finally:
        _unlock(fd, pid)


def find_journals(base: Path, source_ids: Container[str] | None = None) -> Iterator[FoundJournal]:
    """Yield the journals under ``base``, those of dead processes locked by us.

    The caller releases each one before it asks for the next.

    Args:
        base: directory of a machine's journals.
        source_ids: look at these only.
    """
    try:
        names = sorted(os.listdir(base))
    except FileNotFoundError:
        return
    for name in names:
        if not _SOURCE_ID.fullmatch(name) or (source_ids is not None and name not in source_ids):
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
