"""Reads the outbox's files on and on, from where the last look ended, into columns.

A million rows would take many seconds to decode one by one. So a batch is cut into its items
without looking into them; the rows among them are sorted by length and first key, which tells
the stage, and those of one layout are read in one go. Whatever has no layout is decoded.
What comes out is what :meth:`raywb.service.outbox.Outbox.read` gives, number by number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from raywb.service.append_log import AppendLog, Record
from raywb.view.history.batch_rows import BatchRows, Layouts, pack_items
from raywb.view.history.run_history import RunHistory

__all__ = ["OutboxReader"]

#: Bytes of records that are read in one go; less at the beginning, so that something can be shown.
READ_BYTES = (2 * 1024 * 1024, 32 * 1024 * 1024)

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

    Attributes:
        runs: by number.
        position: how far it has read, in bytes of the log.
    """

    def __init__(self, directory: Path, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.runs: dict[int, RunHistory] = {}
        self.position = 0
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._log: AppendLog | None = None
        self._batches = msgspec.msgpack.Decoder(_Batch)
        self._layouts = Layouts()
        self._read_bytes = READ_BYTES[0]
        self._records: Iterator[Record] | None = None
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

    def look(self) -> bool:
        """See whether the log has grown; returns whether there is something to read.

        Raises:
            OSError: it cannot be read.
        """
        if self._log is None:
            if not any(self._directory.glob("*.log")):
                return False
            self._log = AppendLog(self._directory, read_only=True)
        elif self._records is None:
            self._log.refresh()
        return self.position < self._log.end

    def read_some(self) -> bool:
        """Read on; returns whether there is more.

        Raises:
            OSError: the log cannot be read.
        """
        if self._log is None:
            return self.look()
        if self._records is None:
            self._records = iter(self._log.read(self.position))
        records = []
        size = 0
        for next_position, data in self._records:
            records.append(data)
            size += len(data)
            self.position = next_position
            if size >= self._read_bytes:
                break
        else:
            self._records = None
            self.position = self._log.end
        self._read_bytes = min(2 * self._read_bytes, READ_BYTES[1])
        if records:
            self._take(records)
            self._keep_within_memory()
        return self._records is not None

    def _keep_within_memory(self) -> None:
        over = sum(run.nbytes for run in self.runs.values()) - self._memory_bytes
        if over <= 0:
            return
        wanted = over + self._memory_bytes // 8
        for run in sorted(self.runs.values(), key=lambda run: run.nbytes, reverse=True):
            while wanted > 0 and (freed := run.thin_oldest(wanted)):
                wanted -= freed

    def _take(self, records: list[bytes]) -> None:
        raw: list[msgspec.Raw] = []
        counts: list[int] = []
        first_rows: list[dict[int, int]] = []
        for data in records:
            try:
                batch = self._batches.decode(data)
            except msgspec.DecodeError:
                self.undecodable += 1
                continue
            raw += batch.items
            counts.append(len(batch.items))
            first_rows.append(batch.first_rows)
        if raw:
            found = BatchRows(pack_items(raw, counts), self._layouts)
            self.undecodable += found.take(first_rows, self.run)
