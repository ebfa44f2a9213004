"""How long it takes until the facts of every node are there."""

from __future__ import annotations

import statistics

from ray_cluster import RayCluster

from tests.bench.table import Line

#: Nodes of the simulated clusters: raylets on this one machine.
SIZES = (1, 4, 8, 16)

#: Longest that a complete inventory of the largest may take with warm workers, in seconds.
WANTED_S = 5.0

_PROBE = """
import time
import ray
from raywb.nodes.probe import look_at_nodes, probe_nodes
from ray_cluster import report, told

ray.init(log_to_driver=False)
times_s = []
for _ in range(told()):
    found = {}
    began = time.perf_counter()
    nodes = [one.node_id for one in look_at_nodes()]
    probe_nodes(nodes, 120.0, found.__setitem__)
    times_s.append(time.perf_counter() - began)
    assert all(found[node_id].facts for node_id in nodes), found
report([len(nodes), times_s])
"""


def measure(*, quick: bool) -> list[Line]:
    """A line for each size of cluster; every driver is a job of its own, so its first is cold."""
    lines = []
    with RayCluster.start(num_cpus=1) as cluster:
        present = 1
        for size in SIZES[:2] if quick else SIZES:
            while present < size:
                cluster.add_node(num_cpus=1)
                present += 1
            driver = cluster.driver(_PROBE)
            driver.tell(3 if quick else 6)
            count, (cold_s, *warm_s) = driver.next_report(timeout_s=600.0)
            driver.succeed()
            longest_s = max(warm_s)
            lines.append(
                Line(
                    f"facts of every node, {count} {'nodes' if count > 1 else 'node'}",
                    f"warm: median {statistics.median(warm_s):.2f} s, longest {longest_s:.2f} s; "
                    f"cold: {cold_s:.1f} s",
                    f"wanted: at most {WANTED_S:g} s, warm, with 16 nodes" if size == 16 else "",
                    f"raylets on one machine; warm {len(warm_s)} times, cold: a worker is started "
                    "on each node first",
                    longest_s <= WANTED_S if size == 16 else None,
                )
            )
    return lines
