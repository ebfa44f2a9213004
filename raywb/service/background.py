"""What the service does without being asked: merge, sync, and look around now and then."""

from __future__ import annotations

import asyncio
import contextlib
import time

from raywb.service.append_log import sync_and_close
from raywb.service.delivery import Delivery
from raywb.service.ingest import Ingest
from raywb.service.owner import OwnerWatch
from raywb.service.runs import Runs

__all__ = ["Background"]

#: Pause before something that failed is tried again, in seconds.
RETRY_PAUSE_S = 1.0

#: How often the service looks whether the driver that opened the run is still there, in seconds.
OWNER_INTERVAL_S = 0.5

#: How often a run that is offline for want of a key looks for one, in seconds.
KEY_INTERVAL_S = 10.0

#: Pause between two steps of the merge, in seconds.
MERGE_PAUSE_S = 0.02

#: How often rows that wait for other ranks are looked at, in seconds.
RANK_LOOK_S = 0.25

#: Time after which a step of the merge begins no further entry, in seconds.
MERGE_STEP_S = 0.05

#: How often losses that grew are written into the run, in seconds.
LOSS_INTERVAL_S = 10.0


class Background:
    """The parts that run as long as the service lives; each goes on after a failure.

    Args:
        delivery: what was received, and what was made of it.
        ingest: the listener.
        runs: the runs.
        problems: what is wrong at present, by part; shown in the status.
        new_entries: set when the ledger has something new.
    """

    def __init__(
        self,
        delivery: Delivery,
        ingest: Ingest,
        runs: Runs,
        problems: dict[str, str],
        new_entries: asyncio.Event,
    ) -> None:
        self._delivery = delivery
        self._ingest = ingest
        self._runs = runs
        self._problems = problems
        self._new_entries = new_entries

    async def merge(self) -> None:
        """Turn what arrives into finished rows, and write losses into the run when they grow."""
        written: dict[str, int] = {}
        looked_at = time.monotonic()
        self._new_entries.set()
        while True:
            await self._work()
            began = time.monotonic()
            try:
                if self._runs.advance(MERGE_STEP_S, pace_s=self._ingest.pace_s):
                    self._new_entries.set()
                # To add up over all sources is too much for every step.
                if time.monotonic() - looked_at > LOSS_INTERVAL_S:
                    looked_at = time.monotonic()
                    if (losses := self._runs.losses()) != written:
                        self._runs.log_losses(losses)
                        written = losses
                self._problems.pop("outbox", None)
            except OSError as error:
                self._problems["outbox"] = f"the outbox takes nothing: {error}"
                self._new_entries.set()
                await asyncio.sleep(RETRY_PAUSE_S)
            await self._take_breath(time.monotonic() - began)

    async def _take_breath(self, step_s: float) -> None:
        """Pause, so that many small arrivals become one step of the merge.

        While more and more arrives, the listener has as much time as the merge had: whoever waits
        for an acknowledgement keeps his rows on disk, and what is here already can wait.
        """
        deadline = time.monotonic() + step_s
        while True:
            end = self._delivery.ledger.end
            await asyncio.sleep(MERGE_PAUSE_S)
            if self._delivery.ledger.end == end or time.monotonic() > deadline:
                return

    async def _work(self) -> None:
        """Wait for something to merge: new entries, or rows whose time to wait is over."""
        waits_s = RANK_LOOK_S if self._delivery.merge.waiting_rows else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(waits_s):
                await self._new_entries.wait()
        self._new_entries.clear()

    async def watch_owner(self, watch: OwnerWatch) -> None:
        """See how the driver ends that opened the run."""
        while True:
            await asyncio.sleep(OWNER_INTERVAL_S)
            try:
                await watch.look()
                self._problems.pop("owner", None)
            except OSError as error:
                self._problems["owner"] = f"what the run's driver left cannot be had: {error}"

    async def sync(self) -> None:
        """Force ledger and outbox to the disk every second, off the loop."""
        while True:
            await asyncio.sleep(1.0)
            if self._ingest.fsync == "off":
                continue
            try:
                await self._sync_once()
                self._problems.pop("sync", None)
            except OSError as error:
                self._problems["sync"] = f"the disk refuses to sync: {error}"

    async def _sync_once(self) -> None:
        delivery = self._delivery
        sync = delivery.ledger.begin_sync()
        try:
            if sync.fd is not None:
                await asyncio.to_thread(sync_and_close, sync.fd)
        except OSError:
            delivery.ledger.sync_failed(sync)
            raise
        delivery.ledger.end_sync(sync)
        try:
            if (fd := delivery.outbox.unsynced()) is not None:
                await asyncio.to_thread(sync_and_close, fd)
        except OSError:
            delivery.outbox.not_synced()
            raise

    async def look_for_key(self) -> None:
        """A run that is offline only for want of a key goes online when one lies there."""
        while True:
            await asyncio.sleep(KEY_INTERVAL_S)
            try:
                self._runs.go_online()
                self._problems.pop("key", None)
            except OSError as error:
                self._problems["key"] = f"the run cannot go online: {error}"
