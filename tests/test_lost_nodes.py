"""Workers killed on other nodes, nodes that hang or are lost, and nodes that are to become idle."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from typing import NamedTuple

import psutil
import pytest
from child_processes import signal_all
from ray_cluster import Driver, RayCluster
from wandb_file import read_runs

pytestmark = pytest.mark.ray


class Nodes(NamedTuple):
    """A head and two nodes, each with a disk of its own for journals."""

    cluster: RayCluster
    first: psutil.Popen
    second: psutil.Popen

    def driver(self, script: str) -> Driver:
        """Run a driver on the head; a script may use what ``ON_NODES`` says."""
        return self.cluster.driver(ON_NODES + script, self.cluster.disk("head"))

    def processes_of(self, node: psutil.Popen) -> list[psutil.Process]:
        return [*node.children(recursive=True), node]


#: What the drivers here share. The nodes are told from each other by their CPUs.
ON_NODES = """
import os, signal, threading, time
import ray, raywb
from msgspec import to_builtins
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_cluster import report, told, until, without_service

class Worker:
    def log(self, stage, rows):
        client = raywb.attach(stage)
        for i in range(rows):
            client.log({"i": i}, step=i)

    def log_and_die(self, stage, rows):
        self.log(stage, rows)
        os.kill(os.getpid(), signal.SIGKILL)

    def stream(self, stage):
        client = raywb.attach(stage)
        def log():
            for i in range(1_000_000):
                client.log({"i": i}, step=i)
                time.sleep(0.005)
        threading.Thread(target=log, daemon=True).start()

def node(num_cpus):
    (found,) = [node["NodeID"] for node in ray.nodes() if node["Alive"]
                and node["Resources"].get("CPU") == num_cpus]
    return found

def there(num_cpus):
    return {"num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node(num_cpus), soft=False)}

def worker_on(num_cpus):
    return ray.remote(Worker).options(**there(num_cpus)).remote()

def killed():
    return sorted(source.stages[0] for source in raywb.status().sources if source.killed)

ray.init()
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with RayCluster.start(num_cpus=4, journals="head") as cluster:
        first = cluster.add_node(num_cpus=2, journals="first")
        second = cluster.add_node(num_cpus=3, journals="second")
        yield Nodes(cluster, first, second)


def test_rows_of_the_killed_come_home_and_their_nodes_are_left_idle(nodes: Nodes) -> None:
    """By a neighbour, or by one sweep when nobody lives there; then nothing touches the node."""
    # The job that made the service is over when it sweeps.
    nodes.driver("""
without_service()
raywb.start(project="killed", silent_after_s=4.0)
""").succeed()
    driver = nodes.driver("""
from ray.autoscaler.v2.sdk import get_cluster_resource_state

def idle_s():
    client = ray._private.worker.global_worker.gcs_client
    states = get_cluster_resource_state(client).node_states
    return {state.node_id.hex(): state.idle_duration_ms / 1e3 for state in states}

survivor, victim, last = worker_on(2), worker_on(2), worker_on(3)
ray.get(survivor.log.remote("survivor", 10))
victim.log_and_die.remote("victim", 300)
began = time.monotonic()
until("the neighbour", lambda: killed() == ["victim"])
by_neighbour_s = time.monotonic() - began
survivor.log_and_die.remote("survivor", 400)
last.log_and_die.remote("last", 500)
until("the sweeps", lambda: killed() == ["last", "survivor", "victim"])
until("the rows", lambda: raywb.status().received_rows == 10 + 300 + 400 + 500)
# One process is left there, which Ray keeps for the next task.
ray.get(ray.remote(lambda: raywb.attach("task").log({"i": 0})).options(**there(3)).remote())
client, seen = raywb.attach("driver"), []
REPORT_LAG_S = 2.0  # what Ray says of idle times may be that old
time.sleep(REPORT_LAG_S)
began = time.monotonic()
while time.monotonic() - began < 12:
    client.log({"i": len(seen)})
    idle = idle_s()
    seen.append([idle[node(2)], idle[node(3)]])
    time.sleep(0.25)
finished = raywb.finish()
time.sleep(REPORT_LAG_S)
report([by_neighbour_s, seen, len(seen), to_builtins(finished), idle_s()[node(2)]])
""")
    by_neighbour_s, idle_s, own_rows, finished, idle_after_finish_s = driver.succeed()
    print(f"by the neighbour after {by_neighbour_s:.1f} s, idle at the end {idle_s[-1]} s")
    for node in zip(*idle_s, strict=True):
        assert list(node) == sorted(node), "something on the node reset its idle time"
        assert node[-1] > 10.0
    assert idle_after_finish_s >= idle_s[-1][0], "finish touched a node where all had ended"
    assert (finished["complete"], finished["lost"], finished["unconfirmed"]) == (True, {}, [])
    run = read_runs(finished["run"]["dir"])[finished["run"]["id"]]
    assert run.values("victim/i") == list(range(300))
    assert run.values("survivor/i") == [*range(10), *range(400)]
    assert run.values("last/i") == list(range(500))
    assert run.values("driver/i") == list(range(own_rows))


def test_a_node_lost_with_its_disk_is_unconfirmed(nodes: Nodes) -> None:
    """Its sources are named with what was acknowledged, by themselves and in the finish report."""
    driver = nodes.driver("""
run = raywb.start(project="lost", silent_after_s=4.0)
workers = [worker_on(2), worker_on(2), worker_on(3)]
ray.get([worker.stream.remote(f"worker_{n}") for n, worker in enumerate(workers)])
until("rows of all", lambda: 3 == sum(
    "".join(source.stages).startswith("worker_") and source.received_rows > 20
    for source in raywb.status().sources
))
report(node(2))
told()
until("the loss to be seen", lambda: len(raywb.status().unconfirmed) == 2)
report(to_builtins(raywb.status()))
report(to_builtins(raywb.finish()))
""")
    node_id = driver.next_report()
    lost = nodes.processes_of(nodes.first)
    signal_all(lost, signal.SIGKILL)
    psutil.wait_procs(lost, timeout=10)
    shutil.rmtree(nodes.cluster.root / "journals" / "first")
    driver.tell()
    status, finished = driver.next_report(), driver.succeed()
    sources = {source["source_id"]: source for source in status["sources"]}
    for unconfirmed in (status["unconfirmed"], finished["unconfirmed"]):
        assert len(unconfirmed) == 2
        for source in unconfirmed:
            assert (source["node_id"], source["reason"]) == (node_id, "its node is gone")
            known = sources[source["source_id"]]
            assert source["pid"] == known["pid"]
            assert source["acknowledged_bytes"] == known["received_bytes"]
            assert source["received_rows"] == known["received_rows"]
            assert (source["unacknowledged_rows"], source["quiet"]) == (0, False)
    assert not finished["complete"]
    assert "2 sources are unconfirmed" in finished["message"]
    assert finished["delivered_rows"] == finished["received_rows"]
    run = read_runs(finished["run"]["dir"])[finished["run"]["id"]]
    assert run.summary["raywb/unconfirmed_sources"] == 2
    rows = {
        sources[source["source_id"]]["stages"][0]: source["received_rows"]
        for source in finished["unconfirmed"]
    }
    assert sorted(rows) == ["worker_0", "worker_1"]
    for stage, count in rows.items():
        assert run.values(f"{stage}/i") == list(range(count))


def test_a_finish_does_not_wait_for_a_node_that_hangs(nodes: Nodes) -> None:
    """It ends in its time, and names the node and the sources that it could not ask."""
    driver = nodes.driver("""
raywb.start(project="hung", silent_after_s=300.0)
worker = worker_on(3)
ray.get(worker.stream.remote("worker"))
until("rows", lambda: raywb.status().received_rows > 20)
report(node(3))
told()
began = time.monotonic()
finished = raywb.finish(timeout_s=16)
report([time.monotonic() - began, to_builtins(finished)])
""")
    node_id = driver.next_report()
    processes = nodes.processes_of(nodes.second)
    signal_all(processes, signal.SIGSTOP)
    try:
        driver.tell()
        seconds, finished = driver.succeed()
    finally:
        signal_all(processes, signal.SIGCONT)
    assert seconds < 16.0
    assert f"node {node_id[:8]} was not reached" in finished["message"]
    hung = [source for source in finished["unconfirmed"] if source["node_id"] == node_id]
    assert {source["reason"] for source in hung} == {"its node did not answer in time"}
    assert not finished["complete"]
    assert finished["delivered_rows"] == finished["received_rows"]
