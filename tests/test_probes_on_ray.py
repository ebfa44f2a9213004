"""Probes and utilization of every node of a real cluster, all of whose CPUs are taken."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from child_processes import signal_all
from nvml_stub import StubGpu, build_nvml
from ray_cluster import Driver, RayCluster
from wandb_file import WandbRun, read_runs

pytestmark = pytest.mark.ray


class Nodes(NamedTuple):
    cluster: RayCluster
    gpus: Path

    def driver(self, script: str) -> Driver:
        return self.cluster.driver(ON_NODES + script)

    def add(self, num_cpus: int) -> psutil.Popen:
        """Add a node with two GPUs, as far as NVIDIA's driver is concerned."""
        return self.cluster.add_node(num_cpus, environment={"LD_LIBRARY_PATH": str(self.gpus)})

    @staticmethod
    def end(node: psutil.Popen) -> None:
        """Kill a node with all of its processes."""
        lost = [*node.children(recursive=True), node]
        signal_all(lost, signal.SIGKILL)
        psutil.wait_procs(lost, timeout=10)


#: What the drivers here share. The nodes are told from each other by their CPUs.
ON_NODES = """
import time
import ray, raywb
from msgspec import to_builtins
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.util import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_cluster import report, told, until, without_service

def node(num_cpus):
    (found,) = [node["NodeID"] for node in ray.nodes() if node["Alive"]
                and node["Resources"].get("CPU") == num_cpus]
    return found

def take_every_cpu():
    @ray.remote
    class Greedy:
        def ready(self):
            return True

    greedy = [
        Greedy.options(
            num_cpus=one["Resources"]["CPU"],
            scheduling_strategy=NodeAffinitySchedulingStrategy(one["NodeID"], soft=False),
        ).remote()
        for one in ray.nodes() if one["Alive"]
    ]
    ray.get([actor.ready.remote() for actor in greedy])
    until("every CPU to be taken", lambda: ray.available_resources().get("CPU", 0.0) == 0)
    return greedy

def known():
    return {node.node_id: node for node in raywb.status().nodes}

def all_probed(count):
    probed = [one for one in known().values() if one.probed and one.left_s is None]
    return len(probed) == count

def groups():
    return [group["state"] for group in placement_group_table().values()]

def idle_s(node_id):
    client = ray._private.worker.global_worker.gcs_client
    states = get_cluster_resource_state(client).node_states
    return {state.node_id.hex(): state.idle_duration_ms / 1e3 for state in states}[node_id]

ray.init()
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and a node."""
    gpus = [StubGpu(uuid=f"GPU-{number}") for number in range(2)]
    library = build_nvml(tmp_path_factory.mktemp("nvml"), gpus)
    with RayCluster.start(num_cpus=2) as cluster:
        cluster.add_node(num_cpus=1)
        yield Nodes(cluster, library)


def table_of(run: WandbRun) -> list[dict[str, Any]]:
    """The last table of nodes in the run's files, a dict for each row."""
    path = run.segments[-1].parent / "files" / run.values("raywb/nodes.path")[-1]
    table = json.loads(path.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_the_inventory_of_a_cluster_that_is_busy_grows_and_shrinks(nodes: Nodes) -> None:
    """Each node is probed once, also late ones and with no CPU free; all is in every run."""
    driver = nodes.driver("""
without_service()
greedy = take_every_cpu()
began = time.monotonic()
raywb.start(project="nodes", node_metrics_interval_s=2.0)
until("both nodes", lambda: all_probed(2))
report([time.monotonic() - began, ray.available_resources().get("CPU", 0.0)])
told()
late = node(5)
until("the node that came late", lambda: all_probed(3))
time.sleep(2.0)  # what Ray says of idle times may be that old
report([late, sorted(set(groups())), to_builtins(list(known().values()))])
told()  # the service was killed
before = time.monotonic(), idle_s(late)
raywb.attach("driver")
until("the nodes, still known", lambda: all_probed(3))
time.sleep(2.5)
report([*before, time.monotonic(), idle_s(late), raywb.status().incarnation])
told()
until("the loss to be seen", lambda: known()[late].left_s is not None)
first = raywb.finish()
raywb.start(project="nodes")
report([time.time(), to_builtins([known()[late], first, raywb.finish()]), sorted(set(groups()))])
""")
    seconds, free_cpus = driver.next_report()
    print(f"both nodes after {seconds:.1f} s")
    assert free_cpus == 0, "the probes did not run while every CPU was taken"
    added = nodes.add(num_cpus=5)
    driver.tell()
    late, groups, found = driver.next_report()
    assert groups == ["REMOVED"], "a placement group was left behind"
    assert len(found) == len({one["name"] for one in found}) == 3
    (there,) = [one for one in found if one["node_id"] == late]
    assert there["gpus"] == {"NVIDIA H100 80GB HBM3": 2}
    assert there["resources"]["CPU"] == 5
    assert [one["error"] for one in found] == [None] * 3

    service = nodes.cluster.service()
    assert service is not None
    service.kill()
    driver.tell()
    at, idle_s, later, idle_later_s, incarnation = driver.next_report()
    assert incarnation == 2
    print(f"idle {idle_s:.1f} s, {later - at:.1f} s later {idle_later_s:.1f} s")
    lag_s = 1.5  # what Ray says of idle times may be that old
    assert idle_later_s > idle_s + later - at - lag_s, "a restarted service probed it again"
    added.terminate()  # as an autoscaler does it; a killed node is noticed much later
    driver.tell()
    now_s, (gone, first, second), groups = driver.succeed()
    assert gone["joined_s"] < gone["left_s"] <= now_s
    assert groups == ["REMOVED"]

    runs = read_runs(first["run"]["dir"])
    for finished in (first, second):
        run = runs[finished["run"]["id"]]
        assert (finished["complete"], finished["lost"], run.exit_code) == (True, {}, 0)
        cluster = run.config["cluster"]
        assert (cluster["node_count"], cluster["nodes_left"], cluster["gpu_count"]) == (2, 1, 0)
        assert (cluster["ray"]["cpu_count"], cluster["nodes_unprobed"]) == (3, 0)
        table = {row["node_id"]: row for row in table_of(run)}
        assert sorted(row["state"] for row in table.values()) == ["head", "left", "worker"]
        assert table[late]["gpus"] == 2
        assert table[late]["left"] is not None
        assert {row["ray"] for row in table.values()} == {cluster["versions"]["ray"]}
        assert len(run.values("raywb/nodes.path")) <= 3
    check_utilization(runs[first["run"]["id"]], {one["name"] for one in found}, there["name"])


def check_utilization(run: WandbRun, names: set[str], with_gpus: str) -> None:
    """Rows of all nodes on an axis of their own, with values that this machine may have."""
    rows = [row for row in run.history if "nodes/time_s" in row]
    times_s = [row["nodes/time_s"] for row in rows]
    assert times_s == sorted(times_s)
    assert len(rows) >= 4
    assert run.metrics["nodes/*"].step_metric == "nodes/time_s"
    total_gb = psutil.virtual_memory().total / 2**30
    for name in names:
        for key, limit in (("cpu_percent", 100), ("memory_used_gb", total_gb)):
            values = run.values(f"nodes/{name}/{key}")
            assert values, (name, key)
            assert all(0 <= value <= limit for value in values)
    assert max(run.values("nodes/mean/memory_used_gb")) > 0.1
    assert set(run.values("nodes/alive")) >= {2, 3}
    assert set(run.values(f"nodes/{with_gpus}/gpu_percent")) == {20}
    assert set(run.values(f"nodes/{with_gpus}/gpus_idle")) == {1}
    assert set(run.values("nodes/gpu_idle_share")) == {0.5}
    last = rows[-1]
    assert f"nodes/{with_gpus}/cpu_percent" not in last or last["nodes/alive"] == 3


def test_a_node_that_hangs_or_dies_costs_itself_only(nodes: Nodes) -> None:
    """The others' facts come in time, its own error is told, and the group is removed."""
    dying = nodes.add(num_cpus=6)
    driver = nodes.driver("""
import threading
from raywb.nodes.probe import look_at_nodes, probe_nodes

NOBODY = "0" * 56
told_at, began = {}, time.monotonic()

def tell(node_id, result):
    told_at[node_id] = [time.monotonic() - began, bool(result.facts), result.error]

dying = node(6)
others = {one.node_id for one in look_at_nodes()} - {dying}
report(True)
told()
began = time.monotonic()
probe = threading.Thread(target=probe_nodes, args=[[*others, dying, NOBODY], 30.0, tell])
probe.start()
until("facts of the others", lambda: others <= told_at.keys())
report([told_at[node_id] for node_id in others])
probe.join()
report([time.monotonic() - began, told_at[dying], told_at[NOBODY], sorted(set(groups()))])
""")
    assert driver.next_report()
    processes = [*dying.children(recursive=True), dying]
    signal_all(processes, signal.SIGSTOP)
    driver.tell()
    others = driver.next_report()
    nodes.end(dying)
    seconds, died, nobody, groups = driver.succeed()
    print(f"{others}, {died}, all after {seconds:.1f} s")
    assert [one[1:] for one in others] == [[True, None]] * 2
    assert died[1:] in (
        [False, "the probe did not answer within 30 s"],
        [False, "the node left while it was probed"],
    )
    assert nobody[1:] == [False, "the node left before it was probed"]
    assert seconds < 33.0
    assert groups == ["REMOVED"]
