"""What is known of one run: its tables, its series in order of first sight, their axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from raywb.service.outbox import OutDefine
from raywb.view.history.columns import Points, Table, thin

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Piece", "RunHistory"]

#: Sets of keys that get a table of their own; of further ones each key has its own.
MAX_TABLES = 2_000


class Piece(NamedTuple):
    """Rows with the same keys, as they were found: numbers, times, and by key the values."""

    keys: tuple[str, ...]
    rows: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]


class RunHistory:
    """One run's columns.

    Attributes:
        number: the run's number in the outbox.
        rows: how many rows it has so far, with those that have no number in them.
        logged: how many ``log()`` calls they stand for.
        first_time_s, last_time_s: time of its first row, and of its last; None before the first.
        nbytes: memory that its columns take.
        thinned_rows: rows before this number are thinned.
        defines: its metric definitions by name; the last one of a name counts.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows = 0
        self.logged = 0
        self.first_time_s: float | None = None
        self.last_time_s: float | None = None
        self.nbytes = 0
        self.thinned_rows = 0
        self.defines: dict[str, OutDefine] = {}
        self._tables: dict[tuple[str, ...], Table] = {}
        self._of_key: dict[str, list[Table]] = {}
        self._axes: dict[str, tuple[str, bool] | None] = {}
        self._summaries: list[dict[str, float | int | str | None]] | None = None

    # -- what comes in --------------------------------------------------------------------------

    def define(self, item: OutDefine) -> None:
        """Take a metric definition in."""
        self.defines[item.name] = item
        self._axes.clear()
        self._summaries = None

    def note_rows(self, rows: int, logged: int, first_s: float, last_s: float) -> None:
        """The run goes on up to ``rows`` rows; times are of the first and last of those new."""
        self.rows = max(self.rows, rows)
        self.logged += logged
        if self.first_time_s is None:
            self.first_time_s = first_s
        self.last_time_s = last_s

    def add(self, pieces: Iterable[Piece]) -> None:
        """Take rows in, behind those of earlier calls; within one call in any order."""
        found: dict[tuple[str, ...], list[Piece]] = {}
        for piece in pieces:
            if piece.keys:
                found.setdefault(piece.keys, []).append(piece)
        together = [_in_order(some) for some in found.values()]
        # Whose rows came first is first among the series.
        together.sort(key=lambda piece: int(piece.rows[0]))
        for piece in together:
            if piece.keys in self._tables or len(self._tables) < MAX_TABLES:
                self._append(piece)
        strays: dict[tuple[str, ...], list[Piece]] = {}
        for piece in together:
            if piece.keys not in self._tables:
                for column, key in enumerate(piece.keys):
                    one = Piece((key,), piece.rows, piece.times, piece.values[column : column + 1])
                    strays.setdefault(one.keys, []).append(one)
        for some in strays.values():
            self._append(_in_order(some))

    def _append(self, piece: Piece) -> None:
        self._summaries = None
        table = self._tables.get(piece.keys)
        if table is None:
            table = self._tables[piece.keys] = Table(piece.keys)
            for key in piece.keys:
                if key not in self._of_key:
                    self._axes.clear()
                self._of_key.setdefault(key, []).append(table)
        self.nbytes += table.append(piece.rows, piece.times, piece.values)

    def thin_oldest(self, bytes_to_free: int) -> int:
        """Thin the blocks that lie furthest back, those that are least thinned first.

        Returns:
            By how many bytes the columns shrank; 0 when nothing can be thinned any more.
        """
        candidates = [
            (block.size and float(np.nanmax(block.points(0).weight, initial=1.0)) > 1.0, at, table)
            for table in self._tables.values()
            for at, block in enumerate(table.blocks[:-1])
            if block.size >= 2
        ]
        candidates.sort(key=lambda one: (bool(one[0]), int(one[2].blocks[one[1]].rows[0])))
        freed = 0
        for _, at, table in candidates:
            if freed >= bytes_to_free:
                break
            block = table.blocks[at]
            table.blocks[at] = thin(block)
            freed += block.nbytes - table.blocks[at].nbytes
            self.thinned_rows = max(self.thinned_rows, int(block.rows[block.size - 1]) + 1)
        self.nbytes -= freed
        return freed

    # -- what is asked --------------------------------------------------------------------------

    @property
    def keys(self) -> list[str]:
        """Its series in order of first sight."""
        return list(self._of_key)

    def has(self, key: str) -> bool:
        """Whether there is such a series."""
        return key in self._of_key

    def axis_of(self, key: str) -> tuple[str, bool] | None:
        """A series' step axis, and whether a row without it has the last value that there was.

        A definition of exactly this name counts, else the longest glob that covers it. None is
        W&B's own row number; so is an axis that has no numbers.
        """
        if key not in self._axes:
            self._axes[key] = self._find_axis(key)
        return self._axes[key]

    def _find_axis(self, key: str) -> tuple[str, bool] | None:
        define = self.defines.get(key)
        if define is None:
            end = len(key)
            while define is None and end >= 0:
                define = self.defines.get(key[:end] + "*")
                end -= 1
        axis = define.step_metric if define is not None else None
        if define is None or axis is None or axis == key or axis not in self._of_key:
            return None
        return axis, define.step_sync is not False

    def last(self, key: str) -> float:
        """The newest value of a series."""
        newest = max(self._of_key[key], key=lambda table: table.last_row)
        return float(newest.last[newest.columns[key]])

    def summaries(self) -> list[dict[str, float | int | str | None]]:
        """The list of all series; it is made anew when something has come in."""
        if self._summaries is None:
            values = {
                id(table): list(zip(*map(_listed, table.extremes), strict=True))
                for table in self._tables.values()
            }
            self._summaries = [
                self._summary(key, [values[id(t)][t.columns[key]] for t in tables])
                for key, tables in self._of_key.items()
            ]
        return self._summaries

    def _summary(
        self, key: str, extremes: Sequence[tuple[float, ...]]
    ) -> dict[str, float | int | str | None]:
        """One series, from least, greatest and last value in each of its tables."""
        tables = self._of_key[key]
        lows, highs, lasts = zip(*extremes, strict=True)
        newest = max(range(len(tables)), key=lambda at: tables[at].last_row)
        axis = self.axis_of(key)
        return {
            "key": key,
            "namespace": key.rpartition("/")[0],
            "axis": axis[0] if axis else None,
            "points": sum(table.size for table in tables),
            "last": lasts[newest],
            "min": min((low for low in lows if not math.isnan(low)), default=math.nan),
            "max": max((high for high in highs if not math.isnan(high)), default=math.nan),
            "time_s": tables[newest].last_time_s,
        }

    def points(self, key: str) -> Points:
        """All values of a series, by row number."""
        tables = self._of_key[key]
        parts = [part for table in tables for part in table.points(key)]
        joined = Points.join(parts)
        if len(tables) > 1:
            order = np.argsort(joined.rows, kind="stable")
            joined = joined.at(order)
        # Of what is thinned, a bucket may have no value that is finite.
        here = joined.weight > 0
        return joined if here.all() else joined.at(here)


def _listed(values: npt.NDArray[np.float64]) -> list[float]:
    return cast("list[float]", values.tolist())


def _in_order(pieces: list[Piece]) -> Piece:
    """One piece of several with the same keys, its rows ascending."""
    if len(pieces) == 1:
        return pieces[0]
    pieces.sort(key=lambda piece: int(piece.rows[0]))
    rows = np.concatenate([piece.rows for piece in pieces])
    times = np.concatenate([piece.times for piece in pieces])
    values = np.concatenate([piece.values for piece in pieces], axis=1)
    if (rows[1:] < rows[:-1]).any():
        order = np.argsort(rows, kind="stable")
        rows, times, values = rows[order], times[order], values[:, order]
    return Piece(pieces[0].keys, rows, times, values)
