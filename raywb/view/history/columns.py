"""Columns of a run: the rows that have the same keys, as arrays, within a bound of memory.

A *table* holds the rows of one set of keys, in blocks. A block is read as it came, or *thinned*:
then each of its buckets stands for several rows, and keeps of each key the least value, the
greatest, the sum and how many there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

__all__ = ["Block", "Points", "Table", "thin"]

#: Rows in the first block of a table, and in the largest.
BLOCK_ROWS = (64, 16_384)

#: How many buckets of a block become one when it is thinned.
THINNING = 16


class Points(NamedTuple):
    """Values of one series, by row number; each stands for ``weight`` values."""

    rows: Ints
    times: Floats
    low: Floats
    high: Floats
    total: Floats
    weight: Floats

    def at(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Points:
        """Some of them, in any order."""
        return Points(
            self.rows[index],
            self.times[index],
            self.low[index],
            self.high[index],
            self.total[index],
            self.weight[index],
        )

    @staticmethod
    def join(parts: Sequence[Points]) -> Points:
        """All of these, one after the other."""
        return Points(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.times for part in parts]),
            np.concatenate([part.low for part in parts]),
            np.concatenate([part.high for part in parts]),
            np.concatenate([part.total for part in parts]),
            np.concatenate([part.weight for part in parts]),
        )


class Block:
    """Some rows of a table that follow each other, or buckets of such rows.

    Attributes:
        size: rows, or buckets, in it.
        rows, times: of each row; of the first row of each bucket.
        low: by key, the values; the least of each bucket in a block that is thinned.
        high, total, count: the others, of a thinned block.
    """

    def __init__(self, keys: int, capacity: int, *, thinned: bool = False) -> None:
        self.size = 0
        self.rows: Ints = np.empty(capacity, np.int64)
        self.times: Floats = np.empty(capacity)
        self.low: Floats = np.empty((keys, capacity))
        self.high = np.empty((keys, capacity)) if thinned else self.low
        self.total = np.empty((keys, capacity)) if thinned else self.low
        self.count: Floats | None = np.empty((keys, capacity)) if thinned else None

    @property
    def capacity(self) -> int:
        """How many rows it has room for."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Memory that it takes when it is full."""
        values = self.low.nbytes * (1 if self.count is None else 4)
        return self.rows.nbytes + self.times.nbytes + values

    def points(self, column: int) -> Points:
        """One key's values."""
        size = self.size
        low = self.low[column, :size]
        count = self.count[column, :size] if self.count is not None else np.ones(size)
        return Points(
            self.rows[:size],
            self.times[:size],
            low,
            self.high[column, :size],
            self.total[column, :size],
            count,
        )


class Table:
    """The rows of one run that have exactly these numbers, and what their values amount to.

    Attributes:
        keys: the keys of its columns.
        columns: which column a key has.
        blocks: its rows, in their order.
        size: how many rows it has had.
        low, high: least and greatest finite value of each key; NaN where there is none.
        last: the value of each key in the last row.
        last_row, last_time_s: number and time of that row.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.columns = {key: column for column, key in enumerate(keys)}
        self.blocks: list[Block] = []
        self.size = 0
        self.low = np.full(len(keys), np.nan)
        self.high = np.full(len(keys), np.nan)
        self.last = np.full(len(keys), np.nan)
        self.last_row = -1
        self.last_time_s = 0.0

    @property
    def extremes(self) -> tuple[Floats, Floats, Floats]:
        """By key, the least and the greatest finite value, and the last."""
        return self.low, self.high, self.last

    def append(self, rows: Ints, times: Floats, values: Floats) -> int:
        """Take in rows behind those that are here.

        Args:
            rows: their numbers, ascending.
            times: their times.
            values: by key, their values.

        Returns:
            By how many bytes the table grew.
        """
        count = len(rows)
        finite = (
            values if np.isfinite(values).all() else np.where(np.isfinite(values), values, np.nan)
        )
        self.low = np.fmin(self.low, np.fmin.reduce(finite, axis=1))
        self.high = np.fmax(self.high, np.fmax.reduce(finite, axis=1))
        self.last = values[:, -1].copy()
        self.last_row = int(rows[-1])
        self.last_time_s = float(times[-1])
        self.size += count
        grown = begin = 0
        while begin < count:
            block = self.blocks[-1] if self.blocks else None
            if block is None or block.size == block.capacity or block.count is not None:
                block = Block(len(self.keys), self._next_capacity(count - begin))
                self.blocks.append(block)
                grown += block.nbytes
            take = min(count - begin, block.capacity - block.size)
            there = slice(block.size, block.size + take)
            taken = slice(begin, begin + take)
            block.rows[there] = rows[taken]
            block.times[there] = times[taken]
            block.low[:, there] = values[:, taken]
            block.size += take
            begin += take
        return grown

    def _next_capacity(self, wanted: int) -> int:
        least, most = BLOCK_ROWS
        held = sum(block.size for block in self.blocks[-2:])
        return min(max(2 * held, wanted, least), most) if len(self.keys) < 256 else max(least, 256)

    def points(self, key: str) -> Iterator[Points]:
        """One key's values, block by block."""
        column = self.columns[key]
        for block in self.blocks:
            yield block.points(column)


def thin(block: Block) -> Block:
    """The same rows in fewer buckets; every bucket keeps least and greatest of its finite values.

    A value that is not finite is counted no more.
    """
    starts = np.arange(0, block.size, THINNING)
    keys = len(block.low)
    thinned = Block(keys, len(starts), thinned=True)
    thinned.size = len(starts)
    thinned.rows[:] = block.rows[starts]
    thinned.times[:] = block.times[starts]
    size = block.size
    low, high = _finite(block.low[:, :size]), _finite(block.high[:, :size])
    total = np.nan_to_num(_finite(block.total[:, :size]))
    count = np.isfinite(low) * (1.0 if block.count is None else block.count[:, :size])
    thinned.low[:] = np.fmin.reduceat(low, starts, axis=1)
    thinned.high[:] = np.fmax.reduceat(high, starts, axis=1)
    thinned.total[:] = np.add.reduceat(total, starts, axis=1)
    assert thinned.count is not None
    thinned.count[:] = np.add.reduceat(count, starts, axis=1)
    return thinned


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)
