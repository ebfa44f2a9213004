"""Whether the driver that opened the run is still there, and what its end means for the run.

The driver says in its journal that it owns the run, and when it ends, how. One that is killed
says nothing, but the lock of its journal is free then, which a service on the same node can see.
On another node its end is known when a sweep has brought its journal home.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from pathlib import Path

from raywb.reports import SweepReport
from raywb.service.delivery import Delivery
from raywb.service.left import Homecoming
from raywb.service.runs import Runs
from raywb.service.sources import Source
from raywb.service.state import RunState

__all__ = ["OwnerWatch"]

#: After the driver's end Ray kills the workers of its job; how long it is given, in seconds.
SETTLE_S = 3.0

#: How long what they left on this node is looked for after that, in seconds.
SWEEP_S = 10.0

#: Longest that rows are made without a look at what else there is to do, in seconds.
MERGE_STEP_S = 0.05


class OwnerWatch:
    """Looks after the open run's owner.

    Args:
        runs: the runs.
        delivery: what was received.
        cluster_id: the cluster of the journals.
    """

    def __init__(self, runs: Runs, delivery: Delivery, cluster_id: str) -> None:
        self._runs = runs
        self._delivery = delivery
        self._cluster_id = cluster_id
        self._dead_since: float | None = None

    async def look(self) -> None:
        """Look once; ends the run, or lets it rest, where its owner's end asks for it.

        Raises:
            OSError: what the owner left cannot be taken in; the next look tries again.
        """
        run = self._runs.open
        source = self._owner_of(run) if run is not None else None
        if run is None or source is None:
            self._dead_since = None
            return
        if source.end is not None and not source.end.killed:
            await self._ended(run, source)
        elif self._is_dead(source) and not self._others(run, source):
            await self._killed(run, source)
        else:
            self._dead_since = None
            self._runs.rest(run, False)

    def _owner_of(self, run: RunState) -> Source | None:
        for source in self._delivery.merge.sources.values():
            if source.owner is not None and source.owner.run_epoch == run.number:
                return source
        return None

    def _others(self, run: RunState, owner: Source) -> bool:
        """Whether a process of another job has attached to the run, and has not ended."""
        mine = owner.hello.job_id if owner.hello else ""
        return any(
            source.run == run.number
            and not source.ended
            and source.hello is not None
            and source.hello.job_id != mine
            for source in self._delivery.merge.sources.values()
        )

    @staticmethod
    def _is_dead(source: Source) -> bool:
        if source.end is not None and source.end.killed:
            return True
        return source.owner is not None and _is_free(Path(source.owner.journal) / "lock")

    async def _ended(self, run: RunState, source: Source) -> None:
        """The owner ended by itself, and said how.

        Raises:
            OSError: something that it left cannot be taken in; given up after a while, and
                named in the run's report.
        """
        owner, end = source.owner, source.end
        if owner is None or end is None or end.failed is None:
            return
        dead_s = self._dead_s()
        failed: dict[str, str] = {}
        if owner.ends_cluster or (end.failed and not self._others(run, source)):
            failed = await self._bring_home(owner.journal)
            if failed and dead_s < SETTLE_S + SWEEP_S:
                raise OSError("; ".join(failed.values()))
        # All may be otherwise after the wait: somebody called finish(), or attached.
        if self._runs.open is not run:
            return
        if not owner.ends_cluster and (not end.failed or self._others(run, source)):
            self._runs.rest(run, False)
            return
        unreached = [] if owner.ends_cluster else self._away(run, source)
        swept = SweepReport(failed=failed, unreached=unreached)
        self._runs.end(run, int(end.failed), swept if failed or not owner.ends_cluster else None)

    def _dead_s(self) -> float:
        """Since when the owner is known to be gone, in seconds."""
        if self._dead_since is None:
            self._dead_since = time.monotonic()
        return time.monotonic() - self._dead_since

    def _away(self, run: RunState, owner: Source) -> list[str]:
        """Nodes where processes may have rows of the run that only a ``finish()`` reaches."""
        here = owner.hello.node_id if owner.hello else ""
        nodes = {
            source.hello.node_id
            for source in self._delivery.merge.sources.values()
            if source.run == run.number and not source.ended and source.hello is not None
        }
        return sorted(nodes - {here})

    async def _killed(self, run: RunState, source: Source) -> None:
        """The owner is dead, and the run is nobody's: W&B gets all of it, and is left alone."""
        dead_s = self._dead_s()
        failed: dict[str, str] = {}
        if source.owner is not None and dead_s < SETTLE_S + SWEEP_S:
            failed = await self._bring_home(source.owner.journal)
        if dead_s > SETTLE_S and self._runs.open is run:
            self._runs.rest(run, not self._others(run, source))
        if failed:
            raise OSError("; ".join(failed.values()))

    async def _bring_home(self, journal: str) -> dict[str, str]:
        """Take in what processes of this node have in their journals beside the owner's.

        Returns:
            What could not be taken in, with the reason.
        """
        homecoming = Homecoming(self._delivery, self._cluster_id)
        for _ in homecoming.sweep(Path(journal).parent, remove=True):
            await asyncio.sleep(0)
        end = self._delivery.ledger.end
        # In steps, so that the listener is heard in between.
        while self._delivery.position < end and self._runs.advance(MERGE_STEP_S):  # noqa: ASYNC110
            await asyncio.sleep(0)
        return homecoming.failed


def _is_free(lock: Path) -> bool:
    """Whether the process that held a journal's lock is gone; False where it cannot be seen."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False  # on another node, or brought home: then its end is in the ledger
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(fd)
