"""Parquet files: their rows in batches, and which of their bytes a slice needs.

A row group belongs to the slice in which its first byte lies. Of its bytes only the wanted columns
are brought to the node, each at the place where it lies in the stored file, with the footer behind
them: what lies here then is a Parquet file with holes, read as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recipes.stages.rows import RowCounts

__all__ = ["ParquetPart", "parquet_rows"]

#: Decoded at once: about this many bytes, and at most this many rows.
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 256
#: Read at once from a column, so that a whole row group is never held in memory.
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetPart:
    """What is read of a Parquet file; None: all of it."""

    #: Names of top-level columns; one that the file does not have is absent from its rows.
    columns: tuple[str, ...] | None = None
    row_groups: tuple[int, ...] | None = None
    #: Only so many rows from the front of the row groups.
    front_rows: int | None = None


def parquet_rows(
    path: Path, part: ParquetPart, max_row_bytes: int, counts: RowCounts
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file; what cannot be read is counted as ``corrupt_parquet``.

    A page that is damaged costs the rows of its row group from its batch on, and no others.
    A column of bytes is text without a label, as older writers leave it: it is decoded as UTF-8.

    Raises:
        OSError: The disk refused; damage inside the file never raises.
    """
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(
            path,
            buffer_size=_READ_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    except _damage() as error:
        _raise_if_disk(error)
        counts.lose(1, "corrupt_parquet")  # how many rows it held is unknown
        return
    with file:
        yield from _rows(file, part, max_row_bytes, counts)


def _rows(
    file: pq.ParquetFile, part: ParquetPart, max_row_bytes: int, counts: RowCounts
) -> Iterator[dict[str, Any]]:
    groups = range(file.num_row_groups) if part.row_groups is None else part.row_groups
    present = file.schema_arrow.names
    columns = [name for name in present if part.columns is None or name in part.columns]
    left = part.front_rows
    for group in groups:
        wanted = file.metadata.row_group(group).num_rows
        wanted = wanted if left is None else min(wanted, left)
        left = None if left is None else left - wanted
        yield from _rows_of_group(file, group, wanted, columns, max_row_bytes, counts)


def _rows_of_group(
    file: pq.ParquetFile,
    group: int,
    wanted: int,
    columns: list[str],
    max_row_bytes: int,
    counts: RowCounts,
) -> Iterator[dict[str, Any]]:
    if not columns:  # the rows are there, the columns are not
        counts.rows_in += wanted
        yield from ({} for _ in range(wanted))
        return
    size = _batch_rows(file.metadata.row_group(group), columns)
    batches = file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False)
    done = 0
    while done < wanted:
        try:
            batch = next(batches, None)
        except _damage() as error:
            _raise_if_disk(error)
            batch = None
        if batch is None or not batch.num_rows:  # broke off, or holds less than it says
            counts.lose(wanted - done, "corrupt_parquet")
            return
        batch = batch.slice(0, wanted - done)
        done += batch.num_rows
        counts.rows_in += batch.num_rows
        yield from _rows_of_batch(batch, max_row_bytes, counts)


def _rows_of_batch(
    batch: pa.RecordBatch, max_row_bytes: int, counts: RowCounts
) -> Iterator[dict[str, Any]]:
    if batch.nbytes <= max_row_bytes:
        try:
            rows = [_decoded(row) for row in batch.to_pylist()]
        except (ValueError, OverflowError):
            pass  # told apart row by row
        else:
            yield from rows
            return
    for k in range(batch.num_rows):
        one = batch.slice(k, 1)
        if one.nbytes > max_row_bytes:
            counts.filtered["too_long"] += 1
            continue
        try:
            (row,) = one.to_pylist()
            row = _decoded(row)
        except UnicodeDecodeError:
            counts.errors["undecodable"] += 1
        except (ValueError, OverflowError):
            counts.errors["corrupt_parquet"] += 1
        else:
            yield row


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    for name, value in row.items():
        if isinstance(value, bytes):
            row[name] = value.decode("utf-8")
    return row


def _batch_rows(group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """Return how many rows are decoded at once."""
    chunks = (group.column(k) for k in range(group.num_columns))
    size_bytes = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in columns
    )
    fitting = int(_BATCH_BYTES * group.num_rows // max(size_bytes, 1))
    return max(1, min(_BATCH_ROWS, fitting))


def _damage() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises where a file is not as it should be."""
    import pyarrow as pa

    return (pa.ArrowException, OSError)


def _raise_if_disk(error: Exception) -> None:
    """Raise again what the operating system said; damage has no error number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
