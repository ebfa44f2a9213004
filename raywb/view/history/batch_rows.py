"""Rows of some batches, sorted by layout, read, and numbered as the outbox numbers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from raywb.service.outbox import Item, OutDefine, OutRow
from raywb.view.history.row_layout import Layout, NumberAt, NumbersAt, layout_of
from raywb.view.history.run_history import Piece, RunHistory

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
    Words = npt.NDArray[np.uint64]
    Ints = npt.NDArray[np.int64]
    Bools = npt.NDArray[np.bool_]
    Floats = npt.NDArray[np.float64]

__all__ = ["BatchRows", "Items", "Layouts", "locate_items"]

#: Fewer rows than this are decoded one by one: to read them in one go would take longer.
FEWEST_ROWS = 6

#: Layouts that are tried on rows of one length and first key before they are decoded.
LAYOUTS_OF_A_KIND = 12

#: Rows of one layout among the samples of one piece.
SAMPLES = 12

#: Layouts that are kept.
MAX_LAYOUTS = 5_000

#: Bytes of a row's first key that tell rows apart.
_HEAD_BYTES = 48

#: Bytes behind a row that may be looked at.
_BEHIND = 80

#: How many bytes the number of a run has behind its first one, which tells it.
_RUN_BYTES = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}

#: By length of a first key, which of a head's bits belong to it.
_HEAD_MASKS = np.array(
    [[255] * length + [0] * (_HEAD_BYTES - length) for length in range(_HEAD_BYTES + 1)], np.uint8
).view(np.uint64)

#: Odd factors, so that different heads have different sums.
_FACTORS = np.array(
    [pow(0x9E3779B97F4A7C15, 2 * n + 1, 1 << 64) for n in range(_HEAD_BYTES // 8 + 2)], np.uint64
)

_decoder = msgspec.msgpack.Decoder(Item)


class Items(NamedTuple):
    """The items of some batches.

    Attributes:
        data: where they lie.
        offsets, lengths: where each is.
        batch: the number of each one's batch among these.
    """

    data: memoryview
    offsets: Ints
    lengths: Ints
    batch: Ints

    def item(self, index: int) -> memoryview:
        """The bytes of one item."""
        begin = int(self.offsets[index])
        return self.data[begin : begin + int(self.lengths[index])]


def locate_items(data: memoryview, batches: list[tuple[int, int]], lengths: list[int]) -> Items:
    """Find where items lie that follow each other in batches.

    Args:
        data: where they lie.
        batches: where the first item of each batch begins, and how many it has.
        lengths: of all items.
    """
    length = np.array(lengths, np.int64)
    counts = np.array([count for _, count in batches])
    behind = np.cumsum(length)
    first = np.cumsum(counts) - counts
    shift = np.array([begin for begin, _ in batches]) - (behind - length)[first]
    return Items(
        data=data,
        offsets=behind - length + np.repeat(shift, counts),
        lengths=length,
        batch=np.repeat(np.arange(len(batches)), counts),
    )


class Layouts:
    """The layouts that were seen, by what kind of row they are of."""

    def __init__(self) -> None:
        self._of_kind: dict[tuple[int, int], list[Layout]] = {}
        self._count = 0

    def known(self, length: int, kind: int) -> list[Layout]:
        """Layouts of rows of this length and kind, those seen last first."""
        return list(self._of_kind.get((length, kind), ()))

    def add(self, length: int, kind: int, layout: Layout) -> None:
        """Keep one more."""
        if self._count >= MAX_LAYOUTS:
            self._of_kind.clear()
            self._count = 0
        self._of_kind.setdefault((length, kind), []).insert(0, layout)
        self._count += 1


class _Group(NamedTuple):
    """Rows of one layout: which of the items they are, and their bytes, a line for each."""

    layout: Layout
    indices: Ints
    rows: Bytes


class BatchRows:
    """The rows among some items.

    Args:
        items: the items.
        layouts: layouts seen so far.
    """

    def __init__(self, items: Items, layouts: Layouts) -> None:
        self._items = items
        self._layouts = layouts
        self._data: Bytes = np.frombuffer(items.data, np.uint8)
        count = len(items.offsets)
        self._is_row, self._run, self._map_at = self._heads()
        self._number = np.zeros(count, np.int64)
        self._time = np.zeros(count)
        self._logged = np.zeros(count, np.int64)
        self._groups: list[_Group] = []
        self._decoded: dict[int, Item] = {}
        self._kept: Bools = np.ones(count, bool)

    def take(self, first_rows: list[dict[int, int]], run: Callable[[int], RunHistory]) -> int:
        """Read the rows, number them, and put them into their runs' histories.

        Args:
            first_rows: by batch, the number of each run's first row in it.
            run: gives the history of a run by its number.

        Returns:
            How many batches were left out, since something in them cannot be decoded.
        """
        bad = self._decode(self._sort())
        if bad:
            self._kept = ~np.isin(self._items.batch, list(bad))
        for index in sorted(self._decoded):
            item = self._decoded[index]
            if isinstance(item, OutDefine) and self._kept[index]:
                run(item.run).define(item)
        for group in self._groups:
            self._time[group.indices] = _column(group.layout.time, group.rows)
            self._logged[group.indices] = _column(group.layout.logged, group.rows)
        here = self._is_row & self._kept
        pieces: dict[int, list[Piece]] = {}
        for number in np.unique(self._run[here]).tolist():
            of_run = np.flatnonzero(here & (self._run == number))
            pieces[number] = list(self._number_rows(of_run, number, first_rows, run(number)))
        for number, piece in self._pieces():
            pieces[number].append(piece)
        for number, some in pieces.items():
            run(number).add(some)
        return len(bad)

    def samples(self) -> Iterator[Item]:
        """Some of the items in their order: all that were decoded, and of each layout a few rows.

        The last row of each layout is among them. To be called behind :meth:`take`.
        """
        chosen = {*self._decoded}
        for group in self._groups:
            at = np.linspace(0, len(group.indices) - 1, min(len(group.indices), SAMPLES))
            chosen.update(group.indices[at.astype(np.intp)].tolist())
        for index in sorted(chosen):
            if self._kept[index]:
                yield self._decoded.get(index) or _decoder.decode(self._items.item(index))

    # -- which rows there are -------------------------------------------------------------------

    def _heads(self) -> tuple[Bools, Ints, Ints]:
        """Which items are rows, of which run, and where the map of their values begins."""
        data, at = self._data, self._items.offsets
        is_row = (data[at] == 0x96) & (data[at + 1] == 0)
        first = data[at + 2]
        run = first.astype(np.int64)
        map_at = at + 12
        for byte, length in _RUN_BYTES.items():
            some = np.flatnonzero(is_row & (first == byte))
            if len(some):
                digits = data[at[some][:, None] + np.arange(3, 3 + length)].astype(np.int64)
                run[some] = (digits << np.arange(8 * (length - 1), -1, -8)).sum(axis=1)
                map_at[some] += length
        return is_row, run, map_at

    def _kinds(self, rows: Ints) -> Words:
        """One number for each row, equal for rows of the same length, run and first key."""
        data = self._data
        at = self._map_at[rows]
        key_at = at + np.choose((data[at] == 0xDE) + 2 * (data[at] == 0xDF), [1, 3, 5])
        heads = _windows(data, _HEAD_BYTES)[key_at]
        first = heads[:, 0]
        key_bytes = np.where((first >= 0xA0) & (first <= 0xBF), (first & 0x1F) + 1, _HEAD_BYTES)
        long = np.flatnonzero(first == 0xD9)
        key_bytes[long] = np.minimum(heads[long, 1].astype(np.int64) + 2, _HEAD_BYTES)
        words = heads.view(np.uint64)
        words &= _HEAD_MASKS[key_bytes]
        words *= _FACTORS[:-2]
        kinds: Words = words.sum(axis=1, dtype=np.uint64)
        kinds += self._items.lengths[rows].astype(np.uint64) * _FACTORS[-1]
        kinds += self._run[rows].astype(np.uint64) * _FACTORS[-2]
        return kinds

    def _sort(self) -> list[int]:
        """Find the rows that are of one layout; returns the items that are to be decoded."""
        rest: list[int] = np.flatnonzero(~self._is_row).tolist()
        rows = np.flatnonzero(self._is_row)
        # Of the last ones more is looked at than there is.
        near = self._items.offsets[rows] + self._items.lengths[rows] > len(self._data) - _BEHIND
        rest += rows[near].tolist()
        rows = rows[~near]
        if not len(rows):
            return rest
        kinds = self._kinds(rows)
        order = np.argsort(kinds, kind="stable")
        kinds, rows = kinds[order], rows[order]
        starts = np.flatnonzero(kinds[1:] != kinds[:-1]) + 1
        for begin, group in zip([0, *starts.tolist()], np.split(rows, starts), strict=True):
            if len(group) < FEWEST_ROWS:
                rest += group.tolist()
                continue
            length = int(self._items.lengths[group[0]])
            same = self._items.lengths[group] == length
            rest += group[~same].tolist()
            rest += self._sort_kind(length, int(kinds[begin]), group[same])
        return rest

    def _sort_kind(self, length: int, kind: int, left: Ints) -> list[int]:
        """Rows of one length, run and first key: most often of one layout, or of a few."""
        width = -(-length // 8) * 8
        offsets = self._items.offsets[left]
        rows: Bytes = _windows(self._data, width)[offsets]
        rest: list[int] = []
        known = self._layouts.known(length, kind)
        for attempt in range(len(known) + LAYOUTS_OF_A_KIND):
            if attempt < len(known):
                layout: Layout | None = known[attempt]
            else:
                layout = layout_of(rows[0, :length].tobytes())
                if layout is not None:
                    self._layouts.add(length, kind, layout)
            if layout is None:
                rest.append(int(left[0]))
                left, rows = left[1:], rows[1:]
            else:
                same = (rows.view(np.uint64) & layout.mask) == layout.words
                if same.all():
                    self._groups.append(_Group(layout, left, rows))
                    return rest
                other = ~same.all(axis=1)
                if not other.all():
                    self._groups.append(_Group(layout, left[~other], rows[~other]))
                left, rows = left[other], rows[other]
            if not len(left):
                return rest
        rest += left.tolist()
        return rest

    def _decode(self, rest: list[int]) -> set[int]:
        """Decode items one by one; returns the batches in which one cannot be."""
        bad: set[int] = set()
        for index in rest:
            try:
                item = _decoder.decode(self._items.item(index))
            except msgspec.DecodeError:
                bad.add(int(self._items.batch[index]))
                continue
            self._decoded[index] = item
            if isinstance(item, OutRow):
                self._is_row[index] = True
                self._run[index] = item.run
                self._time[index] = item.time_s
                self._logged[index] = item.logged
        return bad

    # -- their numbers --------------------------------------------------------------------------

    def _number_rows(
        self, rows: Ints, number: int, first_rows: list[dict[int, int]], history: RunHistory
    ) -> Iterator[Piece]:
        """Number the rows of one run; yields what stands in the place of lost ones."""
        batch = self._items.batch[rows]
        starts = np.flatnonzero(np.diff(batch, prepend=-1))
        counts = np.diff(starts, append=len(rows))
        begin = np.array([first_rows[one].get(number, -1) for one in batch[starts].tolist()])
        expected = np.concatenate([[history.rows], (begin + counts)[:-1]])
        if (begin != expected).any():
            following = history.rows
            for at, (first, count) in enumerate(zip(begin.tolist(), counts.tolist(), strict=True)):
                if first > following:
                    yield _lost(following, first, float(self._time[rows[starts[at]]]))
                begin[at] = max(first, following)
                following = int(begin[at]) + count
        self._number[rows] = np.arange(len(rows)) + np.repeat(begin - starts, counts)
        history.note_rows(
            rows=int(begin[-1] + counts[-1]),
            logged=int(self._logged[rows].sum()),
            first_s=float(self._time[rows[0]]),
            last_s=float(self._time[rows[-1]]),
        )

    # -- their values ---------------------------------------------------------------------------

    def _pieces(self) -> Iterator[tuple[int, Piece]]:
        """The numbers in the rows, by run."""
        for layout, every, all_rows in self._groups:
            here = self._kept[every]
            indices, rows = (every, all_rows) if here.all() else (every[here], all_rows[here])
            if not len(indices):
                continue
            values = np.empty((len(layout.keys), len(indices)))
            for at in layout.numbers:
                values[at.first : at.first + at.many] = _columns(at, rows)
            yield (
                layout.run,
                Piece(layout.keys, self._number[indices], self._time[indices], values),
            )
        decoded: dict[tuple[int, tuple[str, ...]], list[tuple[int, list[float]]]] = {}
        for index in sorted(self._decoded):
            row = self._decoded[index]
            if isinstance(row, OutRow) and self._kept[index]:
                numbers = {k: float(v) for k, v in row.metrics.items() if not isinstance(v, str)}
                of_keys = decoded.setdefault((row.run, tuple(numbers)), [])
                of_keys.append((index, list(numbers.values())))
        for (run, keys), some in decoded.items():
            indices = np.array([index for index, _ in some])
            values = np.array([values for _, values in some]).T.reshape(len(keys), len(some))
            yield run, Piece(keys, self._number[indices], self._time[indices], values)


def _windows(data: Bytes, width: int) -> Bytes:
    """Every stretch of this width, without a copy."""
    return np.ndarray((len(data) - width + 1, width), np.uint8, data, 0, (1, 1))


def _columns(numbers: NumbersAt, rows: Bytes) -> npt.NDArray[np.generic]:
    """Some numbers of each row, a line for each number, in the type that they have there."""
    shape = (numbers.many, len(rows))
    strides = (numbers.distance, rows.strides[0])
    columns: npt.NDArray[np.generic] = np.ndarray(
        shape, numbers.dtype, rows, numbers.offset, strides
    )
    return columns & np.uint8(1) if numbers.is_bool else columns  # type: ignore[operator]


def _column(number: NumberAt, rows: Bytes) -> npt.NDArray[np.generic]:
    """One number of each row."""
    return np.ndarray((len(rows),), number.dtype, rows, number.offset, (rows.strides[0],))


def _lost(begin: int, end: int, time_s: float) -> Piece:
    """What :meth:`Outbox.read` gives in the place of rows that were in damaged batches."""
    rows = np.arange(begin, end)
    values = np.full((1, len(rows)), float(end - begin))
    return Piece(("raywb/lost/outbox_damaged",), rows, np.full(len(rows), time_s), values)
