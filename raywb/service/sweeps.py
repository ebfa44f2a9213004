"""When to look after silent nodes, and the thread that does it.

A sweep of a node is a Ray task there, and resets the idle time that Ray's autoscaler goes by. So
nothing is periodic: a node is swept when a source on it fell silent without an end and no other
process there is alive, and again, with growing pauses, only as long as that source stays silent.
A node whose sources have ended is never touched.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from raywb.reports import SweepReport
from raywb.service.liveness import Liveness
from raywb.service.ray_calls import call_ray

__all__ = ["Nodes", "SweepPlan", "Sweeps"]

_log = logging.getLogger(__name__)

#: Pauses between sweeps of one node for the same silent sources, in seconds.
PAUSE_RANGE_S = (30.0, 3600.0)

#: Shortest time between two looks through the sources, in seconds.
LOOK_INTERVAL_S = 1.0

#: Longest that one sweep may take, in seconds.
SWEEP_TIMEOUT_S = 60.0


class Nodes(Protocol):
    """The way to the journals of other nodes; with Ray it is :class:`raywb.sweep.RayNodes`."""

    def sweep(
        self, node_ids: Collection[str], address: str, token: str, timeout_s: float
    ) -> SweepReport:
        """Sweep these nodes and the one that this process runs on; may raise anything."""
        ...


class _Swept(NamedTuple):
    """When a node may be swept again for the same sources, and the pause after that."""

    source_ids: set[str]
    not_before: float
    next_pause_s: float


class SweepPlan:
    """Which nodes are due, for how they stand now; no I/O.

    Args:
        liveness: the sources.
        clock: seconds, monotonic.
    """

    def __init__(self, liveness: Liveness, clock: Callable[[], float] = time.monotonic) -> None:
        self._liveness = liveness
        self._clock = clock
        self._swept: dict[str, _Swept] = {}

    def due(self, silence_s: float) -> dict[str, set[str]]:
        """Nodes to be swept now, with their silent sources; each call counts as a sweep.

        Args:
            silence_s: a source that was not heard for longer is silent.
        """
        now = self._clock()
        unattended = self._liveness.unattended(silence_s)
        self._swept = {
            node_id: swept for node_id, swept in self._swept.items() if node_id in unattended
        }
        due = {}
        for node_id, source_ids in unattended.items():
            swept = self._swept.get(node_id)
            pause_s = PAUSE_RANGE_S[0]
            if swept is not None and source_ids <= swept.source_ids:
                if now < swept.not_before:
                    continue
                pause_s = swept.next_pause_s
            due[node_id] = source_ids
            longer_s = min(pause_s * 2, PAUSE_RANGE_S[1])
            self._swept[node_id] = _Swept(source_ids, now + pause_s, longer_s)
        return due


class Sweeps:
    """Sweeps what the plan says, in a thread of its own, one sweep at a time.

    Ray calls may hang or raise: the thread is nobody else's, and what goes wrong is counted and
    told in :attr:`problem`.

    Args:
        liveness: the sources.
        nodes: the way to other nodes.
        silence_s: tells after how many seconds a source is silent at present.
        endpoint: tells the address and token that swept journals are sent to.
    """

    def __init__(
        self,
        liveness: Liveness,
        nodes: Nodes,
        silence_s: Callable[[], float],
        endpoint: Callable[[], tuple[str, str]],
    ) -> None:
        self._liveness = liveness
        self._nodes = nodes
        self._silence_s = silence_s
        self._endpoint = endpoint
        self._plan = SweepPlan(liveness)
        #: Sweeps that were made, and those that came to nothing.
        self.made = 0
        self.failed = 0
        #: What is wrong with the sweeps at present, in one sentence.
        self.problem: str | None = None

    async def serve(self) -> None:
        """Sweep when something is due, for as long as the service lives."""
        while True:
            # There may be very many sources, and a moment more makes silence no worse.
            await asyncio.sleep(max(self._silence_s() / 10, LOOK_INTERVAL_S))
            if due := self._plan.due(self._silence_s()):
                await self._sweep(due)

    async def _sweep(self, due: dict[str, set[str]]) -> None:
        self.made += 1
        since = time.monotonic()

        def tell(waits_s: float) -> None:
            self.problem = (
                f"a sweep of {len(due)} nodes has not returned for {waits_s:.0f} s; journals of "
                "killed processes wait there"
            )

        def sweep() -> SweepReport:
            return self._nodes.sweep(sorted(due), *self._endpoint(), SWEEP_TIMEOUT_S)

        try:
            report = await call_ray("sweep", sweep, SWEEP_TIMEOUT_S * 2, tell)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises, there is a next time
            self.failed += 1
            self.problem = f"{len(due)} nodes could not be swept: {error}"
            _log.warning("raywb: %s", self.problem)
            return
        self.problem = None
        for source_ids in due.values():
            self._liveness.judge(source_ids, report, since)
