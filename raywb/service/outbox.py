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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from raywb.rows import ArtifactFile, Cell, Message, Scalar
from raywb.service.append_log import AppendLog

__all__ = [
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
]


class OutTable(msgspec.Struct, array_like=True, frozen=True):
    """A table in a row, under its full name."""

    key: str
    columns: list[str]
    rows: list[list[Cell]]


class OutRow(msgspec.Struct, array_like=True, tag=0, frozen=True, gc=False):
    """One row as W&B gets it; its number is its place among the rows of its run."""

    run: int
    time_s: float
    metrics: dict[str, Scalar]
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


class Batch(msgspec.Struct, array_like=True):
    """One step of the merge, whole or not at all.

    Attributes:
        run: the run that rows belonged to at this step.
        ledger_position: everything in the ledger before it is consumed.
        consumed: the source ranges that this batch is made of.
        items: what the sinks are to do, in order.
        state: messages that change how later rows are read (who a source is, which channel is
            which stage, its counters), with their source.
        damaged: stretches of the journals that held nothing readable.
    """

    run: int
    ledger_position: int
    consumed: list[Range] = []
    items: list[Item] = []
    state: list[tuple[str, Message | SeriesName]] = []
    damaged: int = 0


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


class Outbox:
    """Append batches; read a run's items from any row number.

    Raises:
        OSError: the directory cannot be made or read, or a write fails.
    """

    #: A row number and its position are remembered about this often, per run.
    INDEX_EVERY_ROWS = 1000

    #: A read ends when it has found this much: a row may hold a table of some megabytes.
    READ_BYTES = 8 * 1024 * 1024

    def __init__(self, directory: Path) -> None:
        self._log = AppendLog(directory)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Batch)
        self._rows: dict[int, int] = {}
        self._index: dict[int, list[tuple[int, int]]] = {}
        self._updates: dict[int, list[_Place]] = {}

    @property
    def end(self) -> int:
        """Position after the last batch."""
        return self._log.end

    @property
    def damaged(self) -> int:
        """Stretches of the outbox that could not be read."""
        return self._log.damaged

    def recover(self) -> Iterator[Batch]:
        """Yield every batch on disk, oldest first, and rebuild the index on the way."""
        position = 0
        for next_position, record in self._log.read(0):
            batch = self._decoder.decode(record)
            self._note(batch, position)
            position = next_position
            yield batch

    def append(self, batch: Batch) -> None:
        """Write one batch down."""
        position = self._log.end
        self._log.append(self._encoder.encode(batch))
        self._note(batch, position)

    def _note(self, batch: Batch, position: int) -> None:
        first_rows: dict[int, int] = {}
        for index, item in enumerate(batch.items):
            self._index.setdefault(item.run, [(0, position)])
            number = None
            if isinstance(item, OutRow):
                number = self._rows.get(item.run, 0)
                first_rows.setdefault(item.run, number)
                self._rows[item.run] = number + 1
                if item.table is None:
                    continue
            if isinstance(item, (OutRow, OutArtifact, OutAlert)):
                place = _Place(position, index, number, type(item))
                self._updates.setdefault(item.run, []).append(place)
        for run, number in first_rows.items():
            if number - self._index[run][-1][0] >= self.INDEX_EVERY_ROWS:
                self._index[run].append((number, position))

    def rows_of(self, run: int) -> int:
        """How many rows the run has."""
        return self._rows.get(run, 0)

    def updates_of(self, run: int) -> int:
        """How many tables, artifacts and alerts the run has; they are numbered from 0."""
        return len(self._updates.get(run, ()))

    def update_type(self, run: int, number: int) -> type[OutRow | OutArtifact | OutAlert]:
        """What kind of update it is; a table is in a row. Reads nothing."""
        return self._updates[run][number].type

    def update(self, run: int, number: int) -> Update:
        """Read one table, artifact or alert.

        Raises:
            OSError: the outbox cannot be read there any more.
        """
        place = self._updates[run][number]
        found = next(self._log.read(place.position), None)
        items = self._decoder.decode(found.data).items if found else []
        item = items[place.nth] if place.nth < len(items) else None
        if not isinstance(item, place.type):
            raise OSError(errno.EIO, f"update {number} of run {run} is damaged in the outbox")
        return Update(place.row, item)

    def cursor(self, run: int, row: int) -> Cursor:
        """A cursor that will yield row number ``row`` of ``run``, and what comes with it."""
        index = self._index.get(run, [(0, self.end)])
        number, position = index[bisect.bisect_right(index, (row, self.end)) - 1]
        return Cursor(run, position, number, row)

    def read(self, cursor: Cursor, limit: int) -> list[tuple[int | None, Item]]:
        """Read on from a cursor: up to about ``limit`` items, each row with its number.

        The cursor moves behind what was returned. An empty list means that there is no more.
        """
        found: list[tuple[int | None, Item]] = []
        read_bytes = 0
        for next_position, record in self._log.read(cursor.position):
            for item in self._decoder.decode(record).items:
                if item.run != cursor.run:
                    continue
                if not isinstance(item, OutRow):
                    found.append((None, item))
                    continue
                if cursor.number >= cursor.first_row:
                    found.append((cursor.number, item))
                cursor.number += 1
            cursor.position = next_position
            read_bytes += len(record)
            if len(found) >= limit or (found and read_bytes >= self.READ_BYTES):
                break
        return found

    def unsynced(self) -> int | None:
        """See :meth:`AppendLog.unsynced`."""
        return self._log.unsynced()

    def close(self) -> None:
        """Sync and close."""
        self._log.close()
