"""How busy the nodes are, as rows of the open run: one row for all of them at each interval."""

from __future__ import annotations

import asyncio
import math
import time

from raywb.nodes.utilization import AT_ONCE, NODE_TIMEOUT_S, metrics_of, read_nodes
from raywb.rows import Scalar
from raywb.service.delivery import Delivery
from raywb.service.inventory import Inventory
from raywb.service.outbox import Item, OutDefine, OutRow
from raywb.service.run_settings import settings_of
from raywb.service.runs import Runs
from raywb.service.state import RunState

__all__ = ["NodeMetrics", "stale_s"]

#: The x-axis of all these series: seconds since the service first read the nodes for the run.
AXIS = "nodes/time_s"

#: How often it is looked whether a run wants to know, while none does, in seconds.
LOOK_S = 1.0

#: Nodes that are read in a second: with more of them the interval is longer, so that the service
#: has time for its sources.
NODES_PER_S = 20.0


#: Without a row for so many pauses, and the time that it takes to ask, nothing is known of the
#: present.
STALE_PAUSES = 3


def pause_s(interval_s: float, nodes: int) -> float:
    """How long it is from one reading to the next, in seconds."""
    return max(interval_s, nodes / NODES_PER_S)


def stale_s(interval_s: float, nodes: int) -> float:
    """From which age on a row says nothing of the present, in seconds.

    Args:
        interval_s: as it was set for the run.
        nodes: how many are asked.
    """
    asking_s = NODE_TIMEOUT_S * math.ceil(nodes / AT_ONCE)
    return STALE_PAUSES * pause_s(interval_s, nodes) + asking_s


class NodeMetrics:
    """Reads the nodes' agents and logs what they say.

    Args:
        inventory: which nodes there are, and where their agents answer.
        delivery: takes the rows.
        runs: tells which run is open, and its settings.

    Attributes:
        gaps: readings that a node did not give, since the service's start.
    """

    def __init__(self, inventory: Inventory, delivery: Delivery, runs: Runs) -> None:
        self._inventory = inventory
        self._delivery = delivery
        self._runs = runs
        self._failed: dict[str, str] = {}
        self._asked = 0
        self._problem: str | None = None
        self.gaps = 0

    @property
    def warnings(self) -> list[str]:
        """What could not be read the last time, or not written, in a sentence each."""
        found = [self._problem] if self._problem else []
        if self._failed:
            name, reason = min(self._failed.items())
            found.append(
                f"the utilization of {len(self._failed)} of {self._asked} nodes could not be read "
                f"({name}: {reason}); their series have gaps"
            )
        return found

    def _wanted(self) -> RunState | None:
        """The run that is to get rows now: it is open, it wants them, and somebody has it."""
        run = self._runs.open
        if run is None or not settings_of(run).node_metrics_interval_s:
            return None
        return run if self._runs.sink_status(run).state != "resting" else None

    async def serve(self) -> None:
        """Read the nodes at every interval, for as long as the service lives."""
        read_at = time.monotonic()
        while True:
            run = self._wanted()
            if run is None:
                self._failed = {}
                await asyncio.sleep(LOOK_S)
                read_at = time.monotonic()
                continue
            interval_s = settings_of(run).node_metrics_interval_s
            until_next_s = pause_s(interval_s, len(self._inventory.endpoints()))
            remaining_s = read_at + until_next_s - time.monotonic()
            if remaining_s > 0:
                await asyncio.sleep(min(remaining_s, LOOK_S))
                continue
            read_at = time.monotonic()
            await self._read(run)

    async def _read(self, run: RunState) -> None:
        endpoints = self._inventory.endpoints()
        time_s = time.time()
        readings, self._failed = await read_nodes(endpoints)
        self._asked = len(endpoints)
        self.gaps += len(self._failed)
        row: dict[str, Scalar] = {**metrics_of(readings, len(endpoints))}
        if not row or self._wanted() is not run:
            return  # nobody answered, or the run has ended meanwhile
        row[AXIS] = round(time_s - self._inventory.axis_of(run.number, time_s), 3)
        items: list[Item] = []
        if "nodes/*" not in self._delivery.folds[run.number].defines:
            items.append(OutDefine(run.number, AXIS, None, None))
            items.append(OutDefine(run.number, "nodes/*", AXIS, None, False))
        items.append(OutRow(run.number, time_s, row, logged=0))
        try:
            self._delivery.add(items)
        except OSError as error:
            self._problem = f"the nodes' utilization is not in the run: {error}"
            return
        self._problem = None
        self._runs.wake()
