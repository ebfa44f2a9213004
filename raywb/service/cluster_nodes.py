"""All that the service does about the cluster's nodes, for whoever wires it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from raywb.reports import Status
from raywb.service.delivery import Delivery
from raywb.service.inventory import Inventory, NodeProbes
from raywb.service.node_metrics import NodeMetrics
from raywb.service.node_reports import NodeReports
from raywb.service.runs import Runs

__all__ = ["ClusterNodes"]


class ClusterNodes:
    """The inventory, what runs are told of it, and how busy the nodes are.

    Args:
        directory: the service's directory.
        cluster_id: which cluster this is.
        probes: the way to the nodes.
        delivery: takes the rows.
        runs: the runs.
    """

    def __init__(
        self,
        directory: Path,
        cluster_id: str,
        probes: NodeProbes,
        delivery: Delivery,
        runs: Runs,
    ) -> None:
        self.inventory = Inventory(directory, cluster_id, probes)
        self._reports = NodeReports(self.inventory, delivery, runs)
        self._metrics = NodeMetrics(self.inventory, delivery, runs)

    def keep_running(
        self, keep_running: Callable[[str, Callable[[], Coroutine[Any, Any, None]]], None]
    ) -> None:
        """Begin; each part goes on after a failure."""
        keep_running("the look at the nodes", self.inventory.serve)
        keep_running("what the run is told of the nodes", self._reports.serve)
        keep_running("the nodes' utilization", self._metrics.serve)

    def add_to(self, status: Status) -> Status:
        """The status with the nodes, and what is wrong or odd about them."""
        problem = self.inventory.problem
        problems = [*([problem] if problem else []), *self._reports.problems.values()]
        return msgspec.structs.replace(
            status,
            nodes=self.inventory.statuses(),
            warnings=[*status.warnings, *self._reports.warnings, *self._metrics.warnings],
            problems=[*status.problems, *problems],
        )
