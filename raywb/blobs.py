"""The lane on which the contents of artifacts travel: in pieces, so that they delay no rows.

The service says how far a blob has come, so an upload goes on where it stopped, whoever sends
it: the process that logged it, or a sweep after its death.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from raywb.frozen import Frozen, blobs_in
from raywb.rows import ArtifactFile

if TYPE_CHECKING:
    from raywb.shipping import Sender

__all__ = ["BlobLane", "BlobRefused", "PieceAnswer", "bring_blobs_home"]

#: Bytes in one request. Rows wait for at most one of them.
PIECE_BYTES = 1024 * 1024

#: Pause after a piece that the service had no place for, in seconds.
BUSY_PAUSE_S = 0.1

#: A blob that was refused is begun anew this often, in case its beginning was damaged there.
ATTEMPTS = 3


class PieceAnswer(msgspec.Struct, frozen=True):
    """How far a blob has come, and whether it is whole."""

    end: int
    whole: bool


class BlobRefused(ConnectionError):
    """Raised when the service will not take a blob: too large, or not what its digest says."""


def _read(path: Path, offset: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), PIECE_BYTES, offset)


class BlobLane:
    """Frozen files of one process that are on their way, in the order in which they were logged.

    Args:
        frozen: where they lie; each is released when it is home.
        count_loss: told the reason when one can never be.

    Attributes:
        added: how many there ever were.
        gone: how many of them are home, or lost.
    """

    def __init__(self, frozen: Frozen, count_loss: Callable[[str], None]) -> None:
        self.added = 0
        self.gone = 0
        self._frozen = frozen
        self._count_loss = count_loss
        self._waiting: deque[tuple[ArtifactFile, int]] = deque()
        self._end: int | None = None
        self._attempts = 0

    @property
    def left(self) -> int:
        """How many are neither home nor lost."""
        return self.added - self.gone

    def add(self, files: list[ArtifactFile], not_before: int) -> None:
        """Send these files as soon as the service has the journal up to ``not_before``.

        The artifact's own message comes first, so the service never has a blob that nobody
        speaks of.
        """
        for file in files:
            self._waiting.append((file, not_before))
            self.added += 1

    def send_piece(self, sender: Sender, acknowledged: int) -> bool:
        """Send the next piece, if there is one; True when there may be another.

        Raises:
            OSError: the service does not answer, or takes nothing now.
        """
        if not self._waiting or self._waiting[0][1] > acknowledged:
            return False
        file, _ = self._waiting[0]
        try:
            piece = b"" if self._end is None else _read(self._frozen.path(file.digest), self._end)
        except OSError:
            piece = b""
        if self._end is not None and not piece:
            return self._done(file, "artifact_unreadable")
        try:
            answer = sender.send_piece(file.digest, file.size_bytes, self._end or 0, piece)
        except BlobRefused:
            self._end = None
            self._attempts += 1
            return self._attempts < ATTEMPTS or self._done(file, "artifact_refused")
        if answer.whole:
            return self._done(file, None)
        moved = answer.end != self._end
        self._end = answer.end
        return moved

    def _done(self, file: ArtifactFile, loss: str | None) -> bool:
        if loss:
            self._count_loss(loss)
        self._waiting.popleft()
        self._frozen.release(file.digest)
        self._end = None
        self._attempts = 0
        self.gone += 1
        return True


def bring_blobs_home(sender: Sender, journal: Path) -> Iterator[None]:
    """Send the frozen files in a journal's directory, one request at a time.

    Args:
        sender: the connection to use.
        journal: the directory; the service has the journal itself already.

    Raises:
        OSError: the service does not take them.
    """
    for digest in blobs_in(journal):
        path = journal / "blobs" / digest
        try:
            size = path.stat().st_size
            answer = sender.send_piece(digest, size, 0, b"")
            while not answer.whole:
                yield
                before = answer.end
                answer = sender.send_piece(digest, size, before, _read(path, before))
                if answer.end == before and not answer.whole:
                    time.sleep(BUSY_PAUSE_S)
        except FileNotFoundError:
            continue  # its process lives, and has brought it home itself
