"""Ledger → merge → outbox: one step at a time, the same after a restart."""

from __future__ import annotations

import itertools
import math
import operator
import time
from collections.abc import Iterable
from pathlib import Path

from raywb.reports import UnconfirmedSource
from raywb.rows import ROW_TAG, TABLE_TAG, Frame, scan
from raywb.service.blobs import BlobStore
from raywb.service.fold import Fold
from raywb.service.ledger import Entry, Ledger
from raywb.service.live_rows import LiveRows
from raywb.service.liveness import Liveness
from raywb.service.merge import Merge
from raywb.service.outbox import Batch, Item, Outbox
from raywb.service.ranks import Waiting
from raywb.service.sources import Source

__all__ = ["Delivery"]

#: A message's second byte, of those that are rows.
_ROW_TAGS = {bytes([ROW_TAG]), bytes([TABLE_TAG])}

_run_of = operator.attrgetter("run")
_position_of = operator.attrgetter("next_position")


class Delivery:
    """The durable middle of the service: what was received, and what was made of it.

    Args:
        directory: the service's directory.
        stage_runs: numbers of the runs that stages have of their own.

    Attributes:
        liveness: which sources have not ended.
        position: everything in the ledger before it was read; rows that wait for other ranks are
            in no batch yet.
        folds: what each run amounts to, by run number.
        live_rows: what the newest rows say, for those who watch.
        began_s: when this was made, on the monotonic clock.

    Raises:
        OSError: the directory cannot be made or read.
    """

    def __init__(self, directory: Path, stage_runs: Iterable[int] = ()) -> None:
        self.began_s = time.monotonic()
        self.liveness = Liveness()
        self.ledger = Ledger(directory / "ledger", observe=self.liveness.note)
        self.outbox = Outbox(directory / "outbox")
        self.blobs = BlobStore(directory / "blobs")
        self.merge = Merge()
        self.merge.stages.known |= set(stage_runs)
        self.folds: dict[int, Fold] = {}
        self.live_rows = LiveRows()
        self.position = 0
        self._unwritten: Batch | None = None
        #: Rows that wait for a run: from which position, up to which, and how many.
        self._waiting = (0, 0, 0)
        for batch in self.outbox.recover():
            self.merge.replay(batch)
            self._take(batch)
        # A power cut may leave the ledger shorter than what the outbox has consumed of it.
        self.ledger.skip_to(self.position)
        if self.outbox.damaged:
            self._recall()

    def _recall(self) -> None:
        """Part of the outbox is gone: the ledger still says which channel is which stage."""
        for entry in self.ledger.read(0):
            if entry.next_position <= self.position:
                self.merge.recall(entry.source_id, entry.data)

    def _take(self, batch: Batch) -> None:
        self.position = max(self.position, batch.ledger_position)
        take = self.live_rows.take
        for run, items in itertools.groupby(batch.items, _run_of):
            fold = self.folds.get(run)
            if fold is None:
                fold = self.folds[run] = Fold()
            for item in items:
                fold.apply(item)
                take(item)

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
        batch = Batch(self.merge.run, self.merge.position(self.position), [], items)
        self.outbox.append(batch)
        self._take(batch)

    def advance(self, limit: int | None, budget_s: float = math.inf) -> bool:
        """Make rows of what the ledger received, up to position ``limit``.

        Each batch is on disk before a sink can see it. One that could not be written is kept
        and comes first at the next call; nothing is consumed before it.

        Args:
            limit: the ledger position to go to; its end where it is None.
            budget_s: no further entry is begun after this time.

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
        deadline = time.monotonic() + budget_s
        for position, entries in itertools.groupby(self.ledger.read(before), _position_of):
            if position > end:
                break
            # Damage may leave several entries with one position: none is done before the last.
            *first, last = entries
            for entry in first:
                self._consume(entry, self.position)
            self._consume(last, position)
            self.position = max(self.position, position)
            if time.monotonic() > deadline:
                return True
        # What lies between the last whole entry and the end is damage, and counted by the log.
        self.position = max(self.position, end)
        return True

    def _consume(self, entry: Entry, next_position: int) -> None:
        self._unwritten = self.merge.consume(
            entry.source_id,
            entry.offset,
            entry.data,
            next_position,
            position=self.position,
            now_s=time.monotonic(),
        )
        self._write_unwritten()

    def release(self, waiting: Waiting | None) -> bool:
        """Make rows of what has waited long enough for other ranks; of all of it without limits.

        Returns:
            Whether there was any.

        Raises:
            OSError: the outbox takes nothing.
        """
        self._write_unwritten()
        if waiting is None:
            self._unwritten = self.merge.flush(self.position)
        else:
            self._unwritten = self.merge.due(time.monotonic(), waiting, self.position)
        released = self._unwritten is not None
        self._write_unwritten()
        return released

    def _write_unwritten(self) -> None:
        if (batch := self._unwritten) is not None:
            self.outbox.append(batch)
            # It is written, whatever happens to it from here on: once more would be rows twice.
            self._unwritten = None
            self._take(batch)

    def waiting_rows(self) -> int:
        """Rows in the ledger that belong to no run yet, since they came after a finish.

        What was counted once is not read again while it waits.
        """
        since, end, rows = self._waiting
        if since != self.position:
            end, rows = self.position, 0
        rows += sum(
            bytes(found.payload[1:2]) in _ROW_TAGS
            for entry in self.ledger.read(end)
            for found in scan(entry.data)
            if isinstance(found, Frame)
        )
        self._waiting = (self.position, self.ledger.end, rows)
        return rows

    def unconfirmed(self) -> list[UnconfirmedSource]:
        """Sources that fell silent, and whose journal cannot be had, as far as is known."""
        found = []
        for source_id, presence in self.liveness.unconfirmed.items():
            source = self.merge.sources.get(source_id, Source())
            end = self.ledger.end_of(source_id)
            missing = None
            # What is still to be merged has not been counted.
            is_merged = source.consumed >= end or source.used.covers(end - 1)
            if presence.rows is not None and is_merged:
                missing = max(presence.rows - source.rows, 0)
            found.append(
                UnconfirmedSource(
                    source_id=source_id,
                    node_id=presence.node_id,
                    hostname=source.hello.hostname if source.hello else "",
                    pid=source.hello.pid if source.hello else 0,
                    acknowledged_bytes=end,
                    received_rows=source.rows,
                    unacknowledged_rows=missing,
                    quiet=presence.quiet and missing == 0,
                    reason=presence.unconfirmed or "",
                )
            )
        return found

    def close(self) -> None:
        """Sync and close."""
        self.ledger.close()
        self.outbox.close()
