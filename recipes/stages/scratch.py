"""Node-local scratch: where a shard's input lies, unpacked, between download and tokenization.

    <system's temp directory>/raywb-recipes-<uid>/<output directory, hashed>/<shard>/

One output directory has one writer at a time, so the next start may wipe what a killed one left.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from recipes.errors import InputError
from recipes.stages.compression import CORRUPT, unpacked
from recipes.stages.parquet_slices import bring_parquet
from recipes.stages.rows import LocalFile
from recipes.stages.shards import InputSlice, Shard, fingerprint
from recipes.stages.sources import source_of
from recipes.stages.store_errors import shown

__all__ = ["Scratch"]

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Scratch:
    """One recipe's scratch space; the same description serves on every node."""

    #: Tells the recipe's directory from others on the node.
    key: str
    #: A whole text longer than this is too long anyway: no more of it is fetched.
    max_text_bytes: int

    @classmethod
    def of(cls, output_dir: Path, max_text_bytes: int) -> Scratch:
        """Return the scratch space that belongs to an output directory."""
        return cls(fingerprint(str(output_dir))[:16], max_text_bytes)

    def fetch(self, shard: Shard, front_bytes: int | None = None) -> tuple[LocalFile, ...]:
        """Bring a shard's slices to this node, unpacked, in their order.

        Args:
            shard: Whose input is wanted.
            front_bytes: Of a slice of JSONL or Parquet, take only so much from its front, and
                whole rows.

        Raises:
            InputError: An input is gone, cannot be read, or is not what was listed.
        """
        folder = self._root() / shard.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return tuple(
            self._fetch_slice(piece, folder / f"{number:06d}", front_bytes)
            for number, piece in enumerate(shard.slices)
        )

    def remove(self, shard: Shard) -> None:
        """Remove a shard's input from this node."""
        shutil.rmtree(self._root() / shard.name, ignore_errors=True)

    def remove_all(self) -> None:
        """Remove everything of this recipe from this node."""
        shutil.rmtree(self._root(), ignore_errors=True)

    def _root(self) -> Path:
        """Return this recipe's directory, in a parent that belongs to this user alone."""
        parent = Path(tempfile.gettempdir(), f"raywb-recipes-{os.getuid()}")
        parent.mkdir(mode=0o700, exist_ok=True)
        status = parent.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise InputError(f"{parent} belongs to somebody else; set TMPDIR to another directory")
        return parent / self.key

    def _fetch_slice(self, piece: InputSlice, path: Path, front_bytes: int | None) -> LocalFile:
        file = piece.file
        source = source_of(file.url)
        try:
            if source.stat(file.url) != (file.size_bytes, file.version):
                raise InputError(f"{shown(file.url)} changed since it was listed; start again")
            with source.open(file.url) as stored:
                if file.format == "parquet":
                    return bring_parquet(piece, stored, path, front_bytes)
                corrupt = self._bring(piece, stored, path, front_bytes)
        except OSError as error:
            raise InputError(
                f"cannot fetch {shown(file.url)}: {error.strerror or error}"
            ) from error
        return LocalFile(path, file.format, corrupt, file.compression)

    def _bring(
        self, piece: InputSlice, stored: BinaryIO, path: Path, front_bytes: int | None
    ) -> bool:
        """Write a slice's bytes to a file, and say whether its archive is corrupt."""
        with path.open("wb") as local:
            try:
                for content in self._contents(piece, stored, front_bytes):
                    local.write(content)
            except CORRUPT:
                return True  # counted by the reader; what came before is kept
        return False

    def _contents(
        self, piece: InputSlice, stored: BinaryIO, front_bytes: int | None
    ) -> Iterator[bytes]:
        """Yield the bytes of a slice: of a text the front, of JSONL all lines that begin in it."""
        file = piece.file
        stream = unpacked(stored, file.compression)
        if file.format == "text":
            yield from _read(stream, self.max_text_bytes)
            return
        size_bytes = None
        if file.compression is None and file.size_bytes is not None:
            begin = line_start(stored, piece.start)
            whole_rest = piece.end == file.size_bytes
            size_bytes = (piece.end if whole_rest else line_start(stored, piece.end)) - begin
            if stored.seekable():
                stored.seek(begin)
        if front_bytes is None or (size_bytes is not None and size_bytes <= front_bytes):
            yield from _read(stream, size_bytes)
        else:
            yield from _read(stream, front_bytes)
            yield stream.readline()


def line_start(stream: BinaryIO, offset: int) -> int:
    """Return where the first line at or after ``offset`` begins.

    Two slices that meet at an offset thus agree on which of them a line belongs to.
    """
    if offset == 0:
        return 0
    stream.seek(offset - 1)
    while piece := stream.readline(_COPY_BYTES):
        if piece.endswith(b"\n"):
            break
    return stream.tell()


def _read(stream: BinaryIO, limit_bytes: int | None) -> Iterator[bytes]:
    """Yield what a stream holds, up to a limit."""
    left = limit_bytes
    while left is None or left > 0:
        piece = stream.read(_COPY_BYTES if left is None else min(_COPY_BYTES, left))
        if not piece:
            return
        left = None if left is None else left - len(piece)
        yield piece
