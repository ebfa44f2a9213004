"""The sweep of a whole cluster: journals of nodes that have nobody to bring them home.

This is the Ray side of ``raywb.orphans``. It runs in the thread of whoever called ``finish``,
and in a thread of the service's own process; never in a thread of ours in a user's process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raywb.cluster import Cluster, connect
from raywb.nodes.probe import Tell, alive_nodes, look_at_nodes, probe_nodes
from raywb.nodes.records import SeenNode
from raywb.orphans import sweep_node
from raywb.reports import SweepReport
from raywb.shipping import Endpoint

__all__ = ["RayNodes", "SweepReport", "sweep_cluster", "sweep_node"]

_log = logging.getLogger(__name__)


def sweep_cluster(
    cluster: Cluster,
    endpoint: Endpoint,
    timeout_s: float,
    node_ids: Collection[str] | None = None,
) -> SweepReport:
    """Sweep this node in this process, and other ones with a task there.

    A task asks for no CPU, so it runs when all are taken. A node that does not answer in time
    is named in the report and costs the others nothing. A task resets the idle time that Ray's
    autoscaler goes by: only nodes where something is outstanding are to be swept.

    Args:
        cluster: this process's cluster.
        endpoint: where the service listens.
        timeout_s: longest that all of it may take.
        node_ids: the other nodes to sweep; all that are alive by default.
    """
    deadline = time.monotonic() + timeout_s
    alive = alive_nodes()
    wanted = alive if node_ids is None else set(node_ids)
    # Through Ray Client this process is outside the cluster, and shares no node's disk.
    here = {cluster.node_id} if cluster.session_dir is not None else set()
    pending: dict[Any, str] = {}
    for node_id in (wanted & alive) - here:
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        task = ray.remote(_sweep_here).options(
            num_cpus=0, scheduling_strategy=strategy, max_retries=0
        )
        pending[task.remote(endpoint, timeout_s)] = node_id
    report = sweep_node(cluster.journal_bases(), endpoint, deadline)
    report.gone = sorted(wanted - alive)
    for reference, node_id in pending.items():
        try:
            report.add(ray.get(reference, timeout=max(deadline - time.monotonic(), 0.1)))
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            report.unreached.append(node_id)
            _log.warning("raywb: node %s could not be swept: %s", node_id, error)
            # Started later, it would only wake a node that has become idle.
            ray.cancel(reference)
    if report.unreached:
        # One that was lost a moment ago looked alive before.
        unreached, alive = set(report.unreached), alive_nodes()
        report.unreached = sorted(unreached & alive)
        report.gone = sorted({*report.gone, *(unreached - alive)})
    return report


def _sweep_here(endpoint: Endpoint, timeout_s: float) -> SweepReport:
    return sweep_node(connect().journal_bases(), endpoint, time.monotonic() + timeout_s)


class RayNodes:
    """The way of the service to the other nodes; made by whoever makes its actor.

    It brings home the journals of silent nodes, and asks new ones what they are.
    """

    def sweep(
        self, node_ids: Collection[str], address: str, token: str, timeout_s: float
    ) -> SweepReport:
        """Sweep these nodes and the one that this process runs on."""
        cluster = connect()
        endpoint = Endpoint(address=address, token=token, cluster_id=cluster.cluster_id)
        return sweep_cluster(cluster, endpoint, timeout_s, node_ids)

    def look(self) -> list[SeenNode]:
        """Every living node; touches none."""
        return look_at_nodes()

    def probe(self, node_ids: Collection[str], timeout_s: float, tell: Tell) -> None:
        """Collect what these nodes are, with one task on each."""
        probe_nodes(node_ids, timeout_s, tell)
