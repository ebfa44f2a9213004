"""The contents of artifacts, by digest: clients send them piece by piece.

A blob is a file ``<directory>/<sha-256>``; while it grows it is called ``<sha-256>.part``. Like
the ledger, the store takes only what begins where a blob ends here, so a piece that is repeated,
late or out of order changes nothing, and an upload goes on where it stopped, also after a
restart. Not more than one piece of each upload is in memory. A blob gets its name only when its
content has that digest and has been forced to the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from raywb.errors import FrameError
from raywb.rows import is_digest

__all__ = ["BlobStore"]

#: Blobs are coming as long as the last piece is not older than this, in seconds.
COMING_S = 5.0


class _Partial:
    """A blob that is not whole yet: how far it has come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0
        self.hash: Any = hashlib.sha256()
        self.opened = False
        self.lock = asyncio.Lock()

    def open(self) -> None:
        """Take over what an earlier incarnation of the service has received."""
        if not self.opened:
            with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
                while piece := file.read(1 << 20):
                    self.hash.update(piece)
                    self.end += len(piece)
            self.opened = True

    def write(self, data: bytes) -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        try:
            written = os.write(fd, data)
            if written != len(data):
                os.ftruncate(fd, self.end)
        finally:
            os.close(fd)
        if written != len(data):
            raise OSError(errno.ENOSPC, "the disk is full", str(self.path))
        self.hash.update(data)
        self.end += len(data)

    def finish(self, path: Path) -> bool:
        """Give the whole blob its name; False when its content is another one, which goes."""
        if self.hash.hexdigest() != path.name:
            self.path.unlink(missing_ok=True)
            return False
        _sync(self.path, os.O_RDONLY | os.O_CREAT)
        self.path.rename(path)
        _sync(path.parent, os.O_RDONLY)
        return True


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class BlobStore:
    """Blobs of one service directory; used in the service's loop only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._partials: dict[str, _Partial] = {}
        self._whole: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            self._whole |= set(filter(is_digest, os.listdir(directory)))
        self._touched_at = -math.inf
        #: Called when another blob is whole.
        self.on_home: Callable[[], None] = lambda: None

    def path(self, digest: str) -> Path:
        """Where a blob lies, or will lie.

        Raises:
            FrameError: this is no digest.
        """
        if not is_digest(digest):
            raise FrameError(f"{digest[:80]!r} is no SHA-256 in hex digits")
        return self.directory / digest

    def has(self, digest: str) -> bool:
        """Whether the whole blob is here."""
        return digest in self._whole

    def end_of(self, digest: str) -> int:
        """How much of a blob that is not whole has come, as far as it is known without a look."""
        partial = self._partials.get(digest)
        return partial.end if partial is not None else 0

    @property
    def are_coming(self) -> bool:
        """Whether a piece of any blob came a moment ago."""
        return time.monotonic() - self._touched_at < COMING_S

    async def offer(self, digest: str, offset: int, size: int, data: bytes) -> tuple[int, bool]:
        """Take a piece when it begins where the blob ends here.

        Args:
            digest: SHA-256 of the whole blob, as hex digits.
            offset: where ``data`` begins in it.
            size: length of the whole blob.
            data: the piece; empty to ask without giving.

        Returns:
            Where the blob ends here now, and whether it is whole.

        Raises:
            FrameError: the blob does not have this digest and size; what was here of it is gone.
            OSError: the disk takes nothing.
        """
        path = self.path(digest)
        self._touched_at = time.monotonic()
        if digest in self._whole:
            return size, True
        self.directory.mkdir(mode=0o700, exist_ok=True)
        partial = self._partials.setdefault(digest, _Partial(path.with_suffix(".part")))
        async with partial.lock:
            if digest in self._whole:
                return size, True
            await asyncio.to_thread(partial.open)
            if offset == partial.end and data:
                await asyncio.to_thread(partial.write, data)
            if partial.end < size:
                return partial.end, False
            whole = partial.end == size and await asyncio.to_thread(partial.finish, path)
            self._partials.pop(digest, None)
            if whole:
                self._whole.add(digest)
        if not whole:
            partial.path.unlink(missing_ok=True)
            raise FrameError(f"the blob {digest[:8]} does not have this digest and size")
        self.on_home()
        return size, True

    def take_in(self, path: Path) -> Iterator[None]:
        """Take over a whole file that lies on this machine under its digest; yields at each piece.

        Raises:
            FrameError: its content has another digest.
            OSError: it cannot be read, or the disk takes nothing.
        """
        target = self.path(path.name)
        if path.name in self._whole:
            return
        self.directory.mkdir(mode=0o700, exist_ok=True)
        # Not the place where an upload of the same blob may be under way.
        taken = _Partial(target.with_suffix(".taken"))
        taken.path.unlink(missing_ok=True)
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                taken.write(piece)
                yield
        if not taken.finish(target):
            raise FrameError(f"the blob {path.name[:8]} does not have this digest")
        self._whole.add(path.name)
        self._partials.pop(path.name, None)
        target.with_suffix(".part").unlink(missing_ok=True)
        self.on_home()

    def delete_all_but(self, kept: Iterable[str]) -> None:
        """Delete the whole blobs that nobody waits for any more."""
        for digest in self._whole - set(kept):
            self.path(digest).unlink(missing_ok=True)
            self._whole.discard(digest)
