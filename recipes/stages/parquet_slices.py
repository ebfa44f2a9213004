"""Which bytes of a Parquet file a slice needs, and how they get to the node.

A row group belongs to the slice in which its first byte lies. Of its bytes only the wanted columns
are brought, each to the place where it lies in the stored file, with the footer behind them: what
lies here then is a Parquet file with holes, read as any other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from recipes.stages.parquet import ParquetPart
from recipes.stages.parquet_footer import FOOTER_DAMAGE, RowGroup, row_groups
from recipes.stages.rows import LocalFile
from recipes.stages.shards import InputSlice

__all__ = ["bring_parquet"]

_MAGIC = b"PAR1"
#: Behind the footer lie its length, little-endian in four bytes, and the magic.
_TAIL_BYTES = 8
_COPY_BYTES = 8 << 20
#: Some old writers leave out the header of a dictionary page where they say how long a column is;
#: other readers allow for this much, too.
_UNCOUNTED_BYTES = 100


def bring_parquet(
    piece: InputSlice, stored: BinaryIO, path: Path, front_bytes: int | None = None
) -> LocalFile:
    """Bring what a slice needs of a Parquet file to this node.

    Args:
        piece: The slice; its file says which columns are wanted.
        stored: The file in its store; where it cannot seek, all of it is brought first.
        path: Where it shall lie.
        front_bytes: Take only the rows from the front that make up about so much of the slice.
    """
    if not stored.seekable():
        whole = path.with_suffix(".whole")
        with whole.open("w+b") as local:
            shutil.copyfileobj(stored, local, _COPY_BYTES)
            whole.unlink()
            return bring_parquet(piece, local, path, front_bytes)
    with path.open("wb") as local:
        footer = _footer(stored)
        size_bytes = stored.seek(0, os.SEEK_END)
        try:
            groups = row_groups(footer)
        except FOOTER_DAMAGE:  # one slice counts it for all
            return LocalFile(path, "parquet", piece.start == 0, parquet=ParquetPart(row_groups=()))
        part = _part(groups, piece, size_bytes, front_bytes)
        if part.row_groups:
            local.write(_MAGIC)
            for begin, end in _ranges(groups, part, size_bytes - len(footer)):
                _copy(stored, local, begin, end)
            local.seek(size_bytes - len(footer))
            local.write(footer)
    return LocalFile(path, "parquet", parquet=part)


def _footer(stored: BinaryIO) -> bytes:
    """Return the end of the file, from the footer on; empty where there is none."""
    size_bytes = stored.seek(0, os.SEEK_END)
    if size_bytes < len(_MAGIC) + _TAIL_BYTES:
        return b""
    stored.seek(size_bytes - _TAIL_BYTES)
    tail = stored.read(_TAIL_BYTES)
    footer_bytes = int.from_bytes(tail[:4], "little") + _TAIL_BYTES
    if not tail.endswith(_MAGIC) or footer_bytes > size_bytes - len(_MAGIC):
        return b""
    stored.seek(size_bytes - footer_bytes)
    return stored.read(footer_bytes)


def _part(
    groups: Sequence[RowGroup], piece: InputSlice, size_bytes: int, front_bytes: int | None
) -> ParquetPart:
    columns = piece.file.columns or None
    end = size_bytes if piece.file.size_bytes is None else piece.end
    begins = [min(max(group.begin, 0), size_bytes - 1) for group in groups]
    numbers = [k for k, begin in enumerate(begins) if piece.start <= begin < end]
    if front_bytes is None:
        return ParquetPart(columns, tuple(numbers))
    rows = [groups[k].rows for k in numbers]
    front_rows = -(-sum(rows) * front_bytes // max(piece.size_bytes, 1))
    needed = [k for n, k in enumerate(numbers) if sum(rows[:n]) < front_rows]
    return ParquetPart(columns, tuple(needed), front_rows)


def _ranges(
    groups: Sequence[RowGroup], part: ParquetPart, footer_begin: int
) -> Iterator[tuple[int, int]]:
    """Yield the bytes of the wanted columns, in their order in the file, adjacent ones in one."""
    chunks = [
        (max(chunk.begin, 0), min(chunk.end + _UNCOUNTED_BYTES, footer_begin))
        for k in part.row_groups or ()
        for chunk in groups[k].chunks
        if part.columns is None or chunk.column in part.columns
    ]
    begun: int | None = None
    ended = 0
    for begin, end in sorted(chunks):
        if begun is None:
            begun, ended = begin, end
        elif begin <= ended:
            ended = max(ended, end)
        else:
            yield begun, ended
            begun, ended = begin, end
    if begun is not None:
        yield begun, ended


def _copy(stored: BinaryIO, local: BinaryIO, begin: int, end: int) -> None:
    stored.seek(begin)
    local.seek(begin)
    while begin < end and (content := stored.read(min(_COPY_BYTES, end - begin))):
        local.write(content)
        begin += len(content)
