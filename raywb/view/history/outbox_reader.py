"""Reads the outbox's files on and on, from where the last look ended, into columns.

A million rows would take many seconds to decode one by one. So a batch is cut into its items
without looking into them; the rows among them are sorted by length and first key, which tells
the stage, and those of one layout are read in one go. Whatever has no layout is decoded.
What comes out is what :meth:`raywb.service.outbox.Outbox.read` gives, number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from raywb.service.append_log import AppendLog
from raywb.service.outbox import Item
from raywb.view.history.batch_rows import BatchRows, Layouts, locate_items
from raywb.view.history.log_pieces import LogPieces, Piece
from raywb.view.history.requests import Seen
from raywb.view.history.run_history import RunHistory

__all__ = ["OutboxReader"]

#: Bytes of records that are read in one go; less at the beginning, so that something can be shown.
READ_BYTES = (2 * 1024 * 1024, 24 * 1024 * 1024)

#: Memory that the columns of all runs may take; beyond it the oldest rows are thinned.
MEMORY_BYTES = 768 * 1024 * 1024


class _Batch(msgspec.Struct, array_like=True):
    """:class:`raywb.service.outbox.Batch`, with its items and what is not needed as they are."""

    run: int
    ledger_position: int
    consumed: msgspec.Raw
    items: list[msgspec.Raw]
    state: msgspec.Raw
    damaged: int = 0
    late: int = 0
    first_rows: dict[int, int] = {}


class OutboxReader:
    """The history of all runs of one service.

    Args:
        directory: the outbox's.
        memory_bytes: see :data:`MEMORY_BYTES`.
        on_item: is given a sample of the items, in their order: the newest row of each layout is
            among them, and all that are no rows.

    Attributes:
        runs: by number.
        position: how far it has read, in bytes of the log.
    """

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes: int = MEMORY_BYTES,
        on_item: Callable[[Item], None] | None = None,
    ) -> None:
        self._on_item = on_item
        self.runs: dict[int, RunHistory] = {}
        self.position = 0
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._log: AppendLog | None = None
        self._batches = msgspec.msgpack.Decoder(_Batch)
        self._layouts = Layouts()
        self._read_bytes = READ_BYTES[0]
        self._pieces: LogPieces | None = None
        #: Batches that could not be read, among those that were whole on disk.
        self.undecodable = 0

    @property
    def end(self) -> int:
        """Where the log ended at the last look."""
        return self._log.end if self._log is not None else 0

    @property
    def damaged(self) -> int:
        """Stretches that cannot be read, among those that were looked at."""
        return self.undecodable + (self._log.damaged if self._log is not None else 0)

    def run(self, number: int) -> RunHistory:
        """The history of one run."""
        if number not in self.runs:
            self.runs[number] = RunHistory(number)
        return self.runs[number]

    def reading(self, number: int) -> dict[str, int]:
        """Rows of a run that were read, and how many there are: a guess until all are read."""
        run = self.runs.get(number)
        rows = run.rows if run is not None else 0
        total = rows
        if self.position < self.end:
            total = max(rows + 1, round(rows * self.end / max(self.position, 1)))
        thinned = run.thinned_rows if run is not None else 0
        return {"rows_read": rows, "rows_total": total, "rows_thinned": thinned}

    def seen(self) -> dict[int, Seen]:
        """What was read of each run."""
        return {
            number: Seen(run.rows, run.logged, run.first_time_s, run.last_time_s)
            for number, run in self.runs.items()
        }

    def look(self) -> bool:
        """See whether the log has grown; returns whether there is something to read.

        Raises:
            OSError: it cannot be read.
        """
        if self._log is None:
            if not any(self._directory.glob("*.log")):
                return False
            self._log = AppendLog(self._directory, read_only=True)
            self._pieces = LogPieces(self._log)
        else:
            self._log.refresh()
        return self.position < self._log.end

    def read_some(self) -> bool:
        """Read on; returns whether there is more of what :meth:`look` saw.

        Raises:
            OSError: the log cannot be read.
        """
        if self._log is None or self._pieces is None:
            return self.look()
        piece = self._pieces.read(self.position, self._read_bytes)
        self._read_bytes = min(2 * self._read_bytes, READ_BYTES[1])
        if piece.records:
            self._take(piece)
            self._keep_within_memory()
        self.position = piece.next_position
        return self.position < self._log.end

    def _keep_within_memory(self) -> None:
        over = sum(run.nbytes for run in self.runs.values()) - self._memory_bytes
        if over <= 0:
            return
        wanted = over + self._memory_bytes // 8
        for run in sorted(self.runs.values(), key=lambda run: run.nbytes, reverse=True):
            while wanted > 0 and (freed := run.thin_oldest(wanted)):
                wanted -= freed

    def _take(self, piece: Piece) -> None:
        lengths: list[int] = []
        batches: list[tuple[int, int]] = []
        first_rows: list[dict[int, int]] = []
        for begin, end in piece.records:
            try:
                batch = self._batches.decode(piece.data[begin:end])
            except msgspec.DecodeError:
                self.undecodable += 1
                continue
            if batch.items:
                batches.append((begin + _items_at(batch), len(batch.items)))
                lengths += map(len, batch.items)
                first_rows.append(batch.first_rows)
        if lengths:
            items = locate_items(piece.data, batches, lengths)
            rows = BatchRows(items, self._layouts)
            self.undecodable += rows.take(first_rows, self.run)
            if self._on_item is not None:
                for item in rows.samples():
                    self._on_item(item)


def _items_at(batch: _Batch) -> int:
    """Where in an encoded batch its first item begins."""
    before = [batch.run, batch.ledger_position]
    many = len(batch.items)
    header = 1 if many < 16 else 3 if many < 1 << 16 else 5
    return 1 + sum(map(_int_bytes, before)) + len(batch.consumed) + header


def _int_bytes(value: int) -> int:
    """How many bytes msgspec takes for an integer that is not negative."""
    if value < 1 << 16:
        return 1 if value < 1 << 7 else 2 if value < 1 << 8 else 3
    return 5 if value < 1 << 32 else 9
