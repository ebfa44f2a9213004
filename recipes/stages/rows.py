"""From stored bytes to rows; what is no row is counted by kind, and nothing raises.

    row          a JSONL line, or a row of a Parquet file
    filtered     empty · too_long
    errors       broken_json · corrupt_gzip · corrupt_parquet · corrupt_zstd · not_an_object ·
                 undecodable

Whoever takes the rows counts what he leaves out of them in the same counts, so that in the end
rows in = rows used + filtered + errors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from recipes.stages.parquet import ParquetPart, parquet_rows
from recipes.stages.sources import Compression, Format

__all__ = ["BYTE_ORDER_MARK", "LocalFile", "RowCounts", "RowReader"]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: Bytes read at once from a line that is too long anyway.
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True)
class LocalFile:
    """A slice of input as it lies on this node, unpacked."""

    path: Path
    format: Format
    #: What was stored broke off or failed its checksum: what lies here is what came before that.
    corrupt: bool = False
    #: How it was packed where it is stored.
    compression: Compression | None = None
    #: Of a Parquet file, what belongs to the slice and is wanted of it.
    parquet: ParquetPart = field(default_factory=ParquetPart)

    @property
    def corrupt_kind(self) -> str:
        """As what a corrupt file is counted."""
        return f"corrupt_{'parquet' if self.format == 'parquet' else self.compression or 'gzip'}"


@dataclass
class RowCounts:
    """Where the rows of one shard went."""

    rows_in: int = 0
    #: Readable rows that were left out on purpose, by kind.
    filtered: Counter[str] = field(default_factory=Counter)
    #: Rows that could not be read, by kind.
    errors: Counter[str] = field(default_factory=Counter)

    def lose(self, rows: int, kind: str) -> None:
        """Count rows that were stored, but cannot be read."""
        self.rows_in += rows
        self.errors[kind] += rows


@dataclass
class RowReader:
    """Reads the rows of one shard as dicts.

    Args:
        max_row_bytes: A JSONL line, or the wanted columns of a Parquet row, that is longer is left
            out unparsed, so that memory stays bounded.
        counts: Where rows are counted: all of them, and those that are left out here.
        not_an_object: The kind of error that JSON other than an object is counted as.
    """

    max_row_bytes: int
    counts: RowCounts
    not_an_object: str = "not_an_object"

    def read(self, file: LocalFile) -> Iterator[dict[str, Any]]:
        """Yield the rows of a JSONL or Parquet file; of Parquet only the wanted columns."""
        if file.format == "parquet":
            if file.corrupt:  # how many rows it held is unknown; one stands for them
                self.counts.lose(1, file.corrupt_kind)
            else:
                yield from parquet_rows(file.path, file.parquet, self.max_row_bytes, self.counts)
            return
        with file.path.open("rb") as stream:
            yield from self._read_lines(stream, file)

    def _read_lines(self, stream: BinaryIO, file: LocalFile) -> Iterator[dict[str, Any]]:
        unfinished = False
        if stream.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            stream.seek(0)
        while line := stream.readline(self.max_row_bytes):
            self.counts.rows_in += 1
            too_long = len(line) == self.max_row_bytes and not line.endswith(b"\n")
            if too_long:
                line = _last_bytes_of_line(stream)
            unfinished = not line.endswith(b"\n")
            if file.corrupt and unfinished:
                self.counts.errors[file.corrupt_kind] += 1
            elif too_long:
                self.counts.filtered["too_long"] += 1
            else:
                row = self._row_of(line)
                if row is not None:
                    yield row
        if file.corrupt and not unfinished:  # how many rows were lost is unknown
            self.counts.lose(1, file.corrupt_kind)

    def _row_of(self, line: bytes) -> dict[str, Any] | None:
        """Return the object that a JSONL line holds, or count why there is none."""
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError:
            self.counts.errors["undecodable"] += 1
            return None
        if not decoded.strip():
            self.counts.filtered["empty"] += 1
            return None
        try:
            row = json.loads(decoded)
        except (ValueError, RecursionError):  # a million brackets in a row are no valid row either
            self.counts.errors["broken_json"] += 1
            return None
        if not isinstance(row, dict):
            self.counts.errors[self.not_an_object] += 1
            return None
        return row


def _last_bytes_of_line(stream: BinaryIO) -> bytes:
    """Skip to the end of a line that is too long, and return its last bytes."""
    last = b" "
    while not last.endswith(b"\n") and (read := stream.readline(_SKIP_BYTES)):
        last = read
    return last
