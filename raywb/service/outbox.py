"""Finished rows, numbered per run: what every sink reads, written before any sink sees it.

Merging depends on time, so its result is written down once: a batch holds the rows of one merge
step together with the source ranges that they were made of and the ledger position before which
nothing is outstanding. On a restart the merge goes on from there, and every sink from its own
cursor; nothing is decided twice.

One log serves all runs of a service, each item naming its run, so that a batch which touches
two runs is one write.
"""

from __future__ import annotations

import bisect
import dataclasses
import errno
import operator
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import msgspec

from raywb.rows import ArtifactFile, Cell, Message, Scalar
from raywb.service.append_log import AppendLog

__all__ = [
    "AttemptNumber",
    "Batch",
    "Cursor",
    "Item",
    "OutAlert",
    "OutArtifact",
    "OutConfig",
    "OutDefine",
    "OutRow",
    "OutSummary",
    "OutTable",
    "Outbox",
    "Range",
    "SeriesName",
    "State",
]

_run_of = operator.attrgetter("run")


class OutTable(msgspec.Struct, array_like=True, frozen=True):
    """A table in a row, under its full name."""

    key: str
    columns: list[str]
    rows: list[list[Cell]]


class OutRow(msgspec.Struct, array_like=True, tag=0, frozen=True, gc=False):
    """One row as W&B gets it; its number is its place among the rows of its run.

    ``logged`` is the number of ``log()`` calls that it was made of; 0 for a row of raywb's own.
    """

    run: int
    time_s: float
    metrics: dict[str, Scalar]
    logged: int = 1
    table: OutTable | None = None


class OutDefine(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """``define_metric`` with full names.

    Attributes:
        step_sync: whether W&B puts the last value of the step metric into rows that lack it;
            None leaves it to W&B, which does. Axes of ours are in every row that they belong to.
    """

    run: int
    name: str
    step_metric: str | None
    summary: str | None
    step_sync: bool | None = None


class OutConfig(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """Values for the run's config."""

    run: int
    values: dict[str, Any]


class OutSummary(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Values for the run's summary, with full names."""

    run: int
    values: dict[str, Any]


class OutArtifact(msgspec.Struct, array_like=True, tag=4, frozen=True):
    """An artifact whose files' contents are blobs of the service."""

    run: int
    name: str
    kind: str
    files: list[ArtifactFile]


class OutAlert(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """An alert, to be sent at most once."""

    run: int
    title: str
    text: str
    level: str


Item = OutRow | OutDefine | OutConfig | OutSummary | OutArtifact | OutAlert


def _is_update(item: Item) -> TypeGuard[OutRow | OutArtifact | OutAlert]:
    table = isinstance(item, OutRow) and item.table is not None
    return table or isinstance(item, (OutArtifact, OutAlert))


class Update(NamedTuple):
    """A table, an artifact or an alert, and the number of its row if it is a table."""

    row: int | None
    item: OutRow | OutArtifact | OutAlert


class _Place(NamedTuple):
    """Where an update is: its batch, its place among the items there, its row."""

    position: int
    nth: int
    row: int | None
    type: type[OutRow | OutArtifact | OutAlert]


class Range(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Bytes of one source's journal that a batch consumed, and how many rows they held."""

    source_id: str
    start: int
    end: int
    rows: int


class SeriesName(msgspec.Struct, array_like=True, tag=32, frozen=True):
    """The name that a source's channel got among the series of its namespace."""

    channel: int
    namespace: str
    name: str


class AttemptNumber(msgspec.Struct, array_like=True, tag=33, frozen=True):
    """Which attempt of its stage a source's channel takes part in, with its rank."""

    channel: int
    number: int


State = Message | SeriesName | AttemptNumber


class Batch(msgspec.Struct, array_like=True):
    """One step of the merge, whole or not at all.

    Attributes:
        run: the run that rows belonged to at this step.
        ledger_position: everything in the ledger before it is consumed; behind it, the ranges
            of this and of earlier batches are.
        consumed: the source ranges that this batch is made of.
        items: what the sinks are to do, in order.
        state: messages that change how later rows are read (who a source is, which channel is
            which stage, its counters), with their source.
        damaged: stretches of the journals that held nothing readable.
        late: rows of ranks whose step had been finished without them.
        first_rows: number of the first row of each run that has rows here; they are numbered
            when they are written, so that a damaged batch moves no other row.
        first_updates: the same of tables, artifacts and alerts.
    """

    run: int
    ledger_position: int
    consumed: list[Range] = []
    items: list[Item] = []
    state: list[tuple[str, State]] = []
    damaged: int = 0
    late: int = 0
    first_rows: dict[int, int] = {}
    first_updates: dict[int, int] = {}


@dataclasses.dataclass
class Cursor:
    """A place in the outbox from which one run's items are read.

    Attributes:
        position: where the next batch begins.
        number: number of the run's next row there.
        first_row: rows before it are passed over.
    """

    run: int
    position: int
    number: int
    first_row: int


class _Mark(NamedTuple):
    """A row's number, its batch's position, and the ``log()`` calls before it."""

    number: int
    position: int
    logged: int


class Outbox:
    """Append batches; read a run's items from any row number.

    Args:
        directory: where its log lies.
        read_only: see :class:`AppendLog`.

    Raises:
        OSError: the directory cannot be made or read, or a write fails.
    """

    #: A row number and its position are remembered about this often, per run.
    INDEX_EVERY_ROWS = 1000

    #: A read ends when it has found this much: a row may hold a table of some megabytes.
    READ_BYTES = 8 * 1024 * 1024

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self._log = AppendLog(directory, read_only=read_only)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Batch)
        self._rows: dict[int, int] = {}
        self._logged: dict[int, int] = {}
        self._undecodable: set[int] = set()
        #: Rows that were in damaged batches, by run; rows that say so stand in their place.
        self.lost_rows: Counter[int] = Counter()
        self._index: dict[int, list[_Mark]] = {}
        self._updates: dict[int, list[_Place | None]] = {}

    @property
    def end(self) -> int:
        """Position after the last batch."""
        return self._log.end

    @property
    def damaged(self) -> int:
        """Stretches of the outbox that could not be read."""
        return self._log.damaged + len(self._undecodable)

    @property
    def torn_bytes(self) -> int:
        """See :class:`AppendLog`."""
        return self._log.torn_bytes

    def recover(self) -> Iterator[Batch]:
        """Yield every batch on disk, oldest first, and rebuild the index on the way."""
        position = 0
        for next_position, batch in self._batches(0):
            self._note(batch, position)
            position = next_position
            yield batch

    def _batches(self, position: int) -> Iterator[tuple[int, Batch]]:
        for next_position, record in self._log.read(position):
            try:
                yield next_position, self._decoder.decode(record)
            except msgspec.DecodeError:
                self._undecodable.add(next_position)

    def append(self, batch: Batch) -> None:
        """Write one batch down; its rows and updates get their numbers."""
        position = self._log.end
        rows = {item.run for item in batch.items if isinstance(item, OutRow)}
        batch.first_rows = {run: self._rows.get(run, 0) for run in rows}
        updates = {item.run for item in batch.items if _is_update(item)}
        batch.first_updates = {run: self.updates_of(run) for run in updates}
        self._log.append(self._encoder.encode(batch))
        self._note(batch, position)

    def _note(self, batch: Batch, position: int) -> None:
        for run in set(map(_run_of, batch.items)):
            self._index.setdefault(run, [_Mark(0, position, 0)])
        if batch.first_updates:
            self._note_updates(batch, position)
        rows: Counter[int] = Counter()
        logged: Counter[int] = Counter()
        for item in batch.items:
            if isinstance(item, OutRow):
                rows[item.run] += 1
                logged[item.run] += item.logged
        for run, count in rows.items():
            known = self._rows.get(run, 0)
            before = self._logged.get(run, 0)
            first_row = batch.first_rows.get(run, known)
            self.lost_rows[run] += first_row - known
            if known - self._index[run][-1].number >= self.INDEX_EVERY_ROWS:
                self._index[run].append(_Mark(known, position, before))
            self._rows[run] = first_row + count
            self._logged[run] = before + logged[run]

    def _note_updates(self, batch: Batch, position: int) -> None:
        for run, first in batch.first_updates.items():
            places = self._updates.setdefault(run, [])
            places += [None] * (first - len(places))  # of a damaged batch
        rows = dict(batch.first_rows)
        for nth, item in enumerate(batch.items):
            number = None
            if isinstance(item, OutRow):
                number = rows[item.run]
                rows[item.run] += 1
            if _is_update(item):
                place = _Place(position, nth, number, type(item))
                self._updates[item.run].append(place)

    def rows_of(self, run: int) -> int:
        """How many rows the run has."""
        return self._rows.get(run, 0)

    def updates_of(self, run: int) -> int:
        """How many tables, artifacts and alerts the run has; they are numbered from 0."""
        return len(self._updates.get(run, ()))

    def update_type(self, run: int, number: int) -> type[OutRow | OutArtifact | OutAlert] | None:
        """What kind of update it is, without a look at the disk; None for one that is damaged.

        A table is in a row.
        """
        place = self._updates[run][number]
        return place.type if place is not None else None

    def update(self, run: int, number: int) -> Update:
        """Read one table, artifact or alert.

        Raises:
            OSError: the outbox cannot be read there any more.
        """
        place = self._updates[run][number]
        if place is not None:
            _, batch = next(self._batches(place.position), (0, Batch(run, 0)))
            # Behind damage comes another batch, with other numbers.
            mine = batch.first_updates.get(run, number + 1) <= number
            item = batch.items[place.nth] if mine and place.nth < len(batch.items) else None
            if isinstance(item, place.type):
                return Update(place.row, item)
        raise OSError(errno.EIO, f"update {number} of run {run} is damaged in the outbox")

    def cursor(self, run: int, row: int) -> Cursor:
        """A cursor that will yield row number ``row`` of ``run``, and what comes with it."""
        mark = self._mark_before(run, row)
        return Cursor(run, mark.position, mark.number, row)

    def _mark_before(self, run: int, row: int) -> _Mark:
        index = self._index.get(run, [_Mark(0, self.end, 0)])
        return index[bisect.bisect_right(index, row, key=lambda mark: mark.number) - 1]

    def logged_rows(self, run: int, rows: int | None = None) -> int:
        """How many ``log()`` calls the run's first ``rows`` rows stand for; all by default."""
        if rows is None or rows >= self.rows_of(run):
            return self._logged.get(run, 0)
        mark = self._mark_before(run, rows)
        logged = mark.logged
        cursor = Cursor(run, mark.position, mark.number, mark.number)
        while items := self.read(cursor, self.INDEX_EVERY_ROWS):
            for number, item in items:
                if number == rows:
                    return logged
                logged += item.logged if isinstance(item, OutRow) else 0
        return logged

    def read(self, cursor: Cursor, limit: int) -> list[tuple[int | None, Item]]:
        """Read on from a cursor: up to about ``limit`` items, each row with its number.

        The cursor moves behind what was returned. An empty list means that there is no more.
        """
        found: list[tuple[int | None, Item]] = []
        begin = cursor.position
        for next_position, batch in self._batches(begin):
            found += _items_of(batch, cursor)
            cursor.position = next_position
            if len(found) >= limit or (found and next_position - begin >= self.READ_BYTES):
                break
        return found

    def unsynced(self) -> int | None:
        """See :meth:`AppendLog.unsynced`."""
        return self._log.unsynced()

    def not_synced(self) -> None:
        """See :meth:`AppendLog.not_synced`."""
        self._log.not_synced()

    def close(self) -> None:
        """Sync and close."""
        self._log.close()


def _items_of(batch: Batch, cursor: Cursor) -> Iterator[tuple[int | None, Item]]:
    """The items of the cursor's run in one batch, each row with its number."""
    first_row = batch.first_rows.get(cursor.run, cursor.number)
    for item in batch.items:
        if item.run != cursor.run:
            continue
        if not isinstance(item, OutRow):
            yield None, item
            continue
        if first_row > cursor.number:
            # What is gone keeps its place: W&B's count of rows is the cursor of the sinks.
            gone: dict[str, Scalar] = {"raywb/lost/outbox_damaged": first_row - cursor.number}
            for number in range(max(cursor.number, cursor.first_row), first_row):
                yield number, OutRow(cursor.run, item.time_s, gone, logged=0)
            cursor.number = first_row
        if cursor.number >= cursor.first_row:
            yield cursor.number, item
        cursor.number += 1
