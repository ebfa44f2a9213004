"""What a run is told of the cluster's nodes: aggregates in its config, a table, and warnings.

Every run is told, also one that is opened in the same service after another one: what is known
when it begins at once, and what changes later with growing pauses, so that a cluster that grows
and shrinks all day does not fill the run with tables. What is still to be told when a run ends is
told then.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable
from typing import Any

import msgspec

from raywb.nodes.records import TABLE_COLUMNS, summarize, table_rows, version_skew
from raywb.nodes.utilization import MAX_SERIES_NODES
from raywb.service.delivery import Delivery
from raywb.service.inventory import Inventory
from raywb.service.outbox import Item, OutAlert, OutConfig, OutRow, OutTable
from raywb.service.runs import Runs
from raywb.service.state import RunState

__all__ = ["NodeReports"]

#: Key of the aggregates in a run's config, and of the table.
CONFIG_KEY = "cluster"
TABLE_KEY = "raywb/nodes"

#: How often it is looked whether there is something to tell, in seconds.
LOOK_S = 0.5

#: Pauses between two times that a run's config, and its table, are written: shortest, longest.
CONFIG_PAUSES_S = (5.0, 300.0)
TABLE_PAUSES_S = (60.0, 3600.0)

#: Tables, artifacts and alerts of a run that are looked through for the last table of nodes.
MOST_SEARCHED = 50

#: How long a run's first table waits for the probes of all nodes, in seconds.
FIRST_TABLE_S = 15.0


class _Pace:
    """Lets something happen at once, then after pauses that grow."""

    def __init__(self, pauses_s: tuple[float, float], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pause_s, self._longest_s = pauses_s
        self._not_before = 0.0

    @property
    def is_due(self) -> bool:
        return self._clock() >= self._not_before

    def note(self) -> None:
        self._not_before = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._longest_s)


class _Told:
    """What a run was told by this incarnation of the service."""

    def __init__(self, run: int, clock: Callable[[], float]) -> None:
        self.run = run
        self.since = clock()
        self.version = -1
        self.table: int | None = None
        self.config_pace = _Pace(CONFIG_PAUSES_S, clock)
        self.table_pace = _Pace(TABLE_PAUSES_S, clock)
        #: Packages about whose versions the run has an alert.
        self.warned: set[str] = set()


class NodeReports:
    """Writes what the inventory knows into the open run.

    Args:
        inventory: the nodes.
        delivery: takes the rows.
        runs: tells which run is open; gets told about its begin and end here.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        inventory: Inventory,
        delivery: Delivery,
        runs: Runs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inventory = inventory
        self._delivery = delivery
        self._runs = runs
        self._clock = clock
        self._told = _Told(0, clock)
        #: What is wrong, by part; shown in the status.
        self.problems: dict[str, str] = {}
        runs.on_begin = self.tell_beginning
        runs.on_end = self.tell_rest

    @property
    def warnings(self) -> list[str]:
        """What is not as one would expect, each in a sentence."""
        nodes = self._inventory.nodes.values()
        found = list(version_skew(nodes).values())
        alive = sum(record.is_alive for record in nodes)
        failed = [one for one in nodes if one.is_alive and one.facts is None and one.error]
        if failed:
            first = f"{failed[0].name}: {failed[0].error}"
            found.append(f"{len(failed)} of {alive} nodes could not be probed ({first})")
        if alive > MAX_SERIES_NODES:
            found.append(
                f"{alive} nodes: their utilization is logged as mean, min and max, not one by "
                f"one (that ends at {MAX_SERIES_NODES})"
            )
        return found

    # -- config, table, warnings ----------------------------------------------------------------

    async def serve(self) -> None:
        """Tell the open run what changes, for as long as the service lives."""
        while True:
            await asyncio.sleep(LOOK_S)
            run = self._runs.open
            if run is not None and self._runs.sink_status(run).state != "resting":
                self._try(run, is_last=False)

    def tell_beginning(self, run: RunState) -> None:
        """A run begins: it gets what is known already."""
        self._try(run, is_last=False)

    def tell_rest(self, run: RunState) -> None:
        """A run ends: it gets what has waited."""
        self._try(run, is_last=True)

    def _try(self, run: RunState, *, is_last: bool) -> None:
        try:
            self._tell(run, is_last=is_last)
        except OSError as error:
            self.problems["nodes"] = f"what is known of the nodes is not in the run: {error}"
        else:
            self.problems.pop("nodes", None)

    def _tell(self, run: RunState, *, is_last: bool) -> None:
        """Write what is new and due; all of it when the run ends."""
        if self._told.run != run.number:
            self._told = _Told(run.number, self._clock)
            self.problems.clear()
        told, version = self._told, self._inventory.version
        if not self._inventory.nodes or told.version == version:
            return
        may_have_table = is_last or self._may_have_table(told)
        may_have_config = is_last or told.config_pace.is_due
        if not (may_have_config or may_have_table):
            return
        config, table = self._new_config(run), self._new_table(run, told)
        items: list[Item] = []
        if config is not None and may_have_config:
            items += [*self._alerts(run, config), OutConfig(run.number, {CONFIG_KEY: config})]
        if table is not None and may_have_table:
            items.append(OutRow(run.number, time.time(), {}, logged=0, table=table))
        if items:
            self._delivery.add(items)
            self._runs.wake()
        if config is not None and may_have_config:
            told.config_pace.note()
            told.warned |= config["version_skew"].keys()
        if table is not None and may_have_table:
            told.table_pace.note()
            told.table = _digest(table)
        if (config is None or may_have_config) and (table is None or may_have_table):
            told.version = version

    def _new_config(self, run: RunState) -> dict[str, Any] | None:
        """The aggregates, if the run has others; None also where the key is a user's own."""
        nodes = self._inventory.nodes.values()
        values = summarize(nodes) | {
            "nodes_left": self._inventory.left,
            "version_skew": version_skew(nodes),
            "utilization": "each node"
            if sum(record.is_alive for record in nodes) <= MAX_SERIES_NODES
            else "mean, min and max",
        }
        has = self._delivery.folds[run.number].config.get(CONFIG_KEY)
        is_ours = has is None or (isinstance(has, dict) and "nodes_unprobed" in has)
        if not is_ours:
            self.problems[CONFIG_KEY] = (
                f"the run's config has a {CONFIG_KEY!r} of somebody else: the nodes are not in it"
            )
            return None
        self.problems.pop(CONFIG_KEY, None)
        return values if values != has else None

    def _alerts(self, run: RunState, config: dict[str, Any]) -> list[Item]:
        """A warning about each package that nodes differ in, if it is not in the config yet.

        They go into the outbox together with the config, so a restarted service sees what it
        has warned about.
        """
        has = self._delivery.folds[run.number].config.get(CONFIG_KEY) or {}
        new = config["version_skew"].keys() - has.get("version_skew", {}).keys()
        skew = config["version_skew"]
        return [
            OutAlert(run.number, f"Versions of {package} differ", skew[package], "WARN")
            for package in sorted(new - self._told.warned)
        ]

    def _may_have_table(self, told: _Told) -> bool:
        """The pause is over, and a run's first table has waited for the probes."""
        waited_s = self._clock() - told.since
        is_complete = self._inventory.is_settled or waited_s > FIRST_TABLE_S
        return told.table_pace.is_due and is_complete

    def _new_table(self, run: RunState, told: _Told) -> OutTable | None:
        """The table, if the run's last one says something else."""
        rows = table_rows(self._inventory.nodes.values())
        table = OutTable(TABLE_KEY, list(TABLE_COLUMNS), rows)
        if told.table is None:
            told.table = self._last_table(run)
        return table if _digest(table) != told.table else None

    def _last_table(self, run: RunState) -> int | None:
        """Digest of the table that an earlier incarnation of the service gave the run."""
        outbox = self._delivery.outbox
        count = outbox.updates_of(run.number)
        for number in range(count - 1, max(count - MOST_SEARCHED, 0) - 1, -1):
            if outbox.update_type(run.number, number) is OutRow:
                item = outbox.update(run.number, number).item
                if isinstance(item, OutRow) and item.table and item.table.key == TABLE_KEY:
                    return _digest(item.table)
        return None


def _digest(table: OutTable) -> int:
    return zlib.crc32(msgspec.json.encode(table))
