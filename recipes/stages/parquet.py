"""The rows of Parquet files, in batches; what cannot be read is counted and nothing raises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recipes.stages.rows import RowCounts

__all__ = ["CORRUPT_PARQUET", "ParquetPart", "parquet_rows"]

#: As what damage is counted.
CORRUPT_PARQUET = "corrupt_parquet"

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
    if part.row_groups == ():
        return
    try:
        file = _opened(path)
        groups = _wanted_groups(file, part)
    except _damage() as error:
        _raise_if_disk(error)
        counts.lose(1, CORRUPT_PARQUET)  # how many rows it held is unknown
        return
    with file:
        for group in groups:
            yield from _rows_of_group(file, group, max_row_bytes, counts)


@dataclass(frozen=True)
class _Group:
    """A row group, and what is wanted of it."""

    number: int
    rows: int
    columns: tuple[str, ...]
    #: How many rows are decoded at once.
    batch_rows: int


def _opened(path: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(
        path, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _wanted_groups(file: pq.ParquetFile, part: ParquetPart) -> list[_Group]:
    numbers = range(file.num_row_groups) if part.row_groups is None else part.row_groups
    present = file.schema_arrow.names
    columns = tuple(name for name in present if part.columns is None or name in part.columns)
    groups = []
    left = part.front_rows
    for number in numbers:
        metadata = file.metadata.row_group(number)
        rows = metadata.num_rows if left is None else min(metadata.num_rows, left)
        left = None if left is None else left - rows
        groups.append(_Group(number, rows, columns, _batch_rows(metadata)))
    return groups


def _batch_rows(metadata: pq.RowGroupMetaData) -> int:
    fitting = _BATCH_BYTES * metadata.num_rows // max(metadata.total_byte_size, 1)
    return max(1, min(_BATCH_ROWS, int(fitting)))


def _rows_of_group(
    file: pq.ParquetFile, group: _Group, max_row_bytes: int, counts: RowCounts
) -> Iterator[dict[str, Any]]:
    if not group.columns:  # the rows are there, the columns are not
        counts.rows_in += group.rows
        yield from ({} for _ in range(group.rows))
        return
    batches = file.iter_batches(
        group.batch_rows,
        row_groups=[group.number],
        columns=list(group.columns),
        use_threads=False,
    )
    done = 0
    while done < group.rows:
        try:
            batch = next(batches, None)
        except _damage() as error:
            _raise_if_disk(error)
            batch = None
        if batch is None or not batch.num_rows:  # broke off, or holds less than it says
            counts.lose(group.rows - done, CORRUPT_PARQUET)
            return
        batch = batch.slice(0, group.rows - done)
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
            counts.errors[CORRUPT_PARQUET] += 1
        else:
            yield row


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    for name, value in row.items():
        if isinstance(value, bytes):
            row[name] = value.decode("utf-8")
    return row


def _damage() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises where a file is not as it should be."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


def _raise_if_disk(error: Exception) -> None:
    """Raise again what the operating system said; damage has no error number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
