"""Ledger → merge → outbox: one step at a time, the same after a restart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from raywb.rows import ROW_TAG, TABLE_TAG, Frame, scan
from raywb.service.blobs import BlobStore
from raywb.service.fold import Fold
from raywb.service.ledger import Ledger
from raywb.service.merge import Merge
from raywb.service.outbox import Batch, Item, Outbox, OutRow

__all__ = ["Delivery"]


class Delivery:
    """The durable middle of the service: what was received, and what was made of it.

    Attributes:
        position: everything in the ledger before it is consumed.
        folds: what each run amounts to, by run number.
        own_rows: rows of raywb's own making, by run number.

    Raises:
        OSError: the directory cannot be made or read.
    """

    def __init__(self, directory: Path) -> None:
        self.ledger = Ledger(directory / "ledger")
        self.outbox = Outbox(directory / "outbox")
        self.blobs = BlobStore(directory / "blobs")
        self.merge = Merge()
        self.folds: dict[int, Fold] = {}
        self.own_rows: Counter[int] = Counter()
        self.position = 0
        self._unwritten: Batch | None = None
        for batch in self.outbox.recover():
            self.merge.replay(batch)
            self._take(batch)

    def _take(self, batch: Batch) -> None:
        self.position = max(self.position, batch.ledger_position)
        for item in batch.items:
            self.own_rows[item.run] += not batch.consumed and isinstance(item, OutRow)
            self.folds.setdefault(item.run, Fold()).apply(item)

    def open_run(self, number: int) -> None:
        """Rows from here on belong to run ``number``."""
        self.merge.open_run(number)
        self.folds.setdefault(number, Fold())

    def add(self, items: list[Item]) -> None:
        """Put items of the service's own making into the outbox.

        Raises:
            OSError: the outbox takes nothing, and the items are not in it.
        """
        self._write_unwritten()
        batch = Batch(self.merge.run, self.position, [], items)
        self.outbox.append(batch)
        self._take(batch)

    def advance(self, limit: int | None) -> bool:
        """Make rows of what the ledger received, up to position ``limit``.

        Each batch is on disk before a sink can see it. One that could not be written is kept
        and comes first at the next call; nothing is consumed before it.

        Returns:
            Whether anything was consumed.

        Raises:
            OSError: the outbox takes nothing.
        """
        self._write_unwritten()
        before = self.position
        end = self.ledger.end if limit is None else limit
        if before >= end:
            return False
        for entry in self.ledger.read(before):
            if entry.next_position > end:
                break
            self._unwritten = self.merge.consume(
                entry.source_id, entry.offset, entry.data, entry.next_position
            )
            self._write_unwritten()
            self.position = max(self.position, entry.next_position)
        # What lies between the last whole entry and the end is damage, and counted by the log.
        self.position = max(self.position, end)
        return True

    def _write_unwritten(self) -> None:
        if self._unwritten is not None:
            self.outbox.append(self._unwritten)
            self._take(self._unwritten)
            self._unwritten = None

    def waiting_rows(self) -> int:
        """Rows in the ledger that belong to no run yet, since they came after a finish."""
        return sum(
            found.payload[1] in (ROW_TAG, TABLE_TAG)
            for entry in self.ledger.read(self.position)
            for found in scan(entry.data)
            if isinstance(found, Frame)
        )

    def close(self) -> None:
        """Sync and close."""
        self.ledger.close()
        self.outbox.close()
