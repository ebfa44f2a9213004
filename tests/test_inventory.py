"""What the service learns of nodes, keeps, and tells its runs; the nodes are this test's own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from local_service import CLUSTER, LocalService, local_service
from ray_cluster import until
from rich.console import Console
from wandb_file import WandbRun, read_runs

from raywb.nodes.probe import ProbeResult
from raywb.nodes.records import SeenNode
from raywb.reports import Status, SweepReport
from raywb.service import inventory as inventory_module
from raywb.service import node_reports
from raywb.service.inventory import Inventory
from raywb.view.terminal import render_status


class Machines:
    """A cluster without Ray: its nodes, and what each of them answers to a probe."""

    def __init__(self, *names: str) -> None:
        self.nodes = {name: self.node(name) for name in names}
        self.facts: dict[str, dict[str, Any]] = {}
        self.probed: list[str] = []
        #: Nodes whose probe hangs until the event is set, and nodes whose probe fails.
        self.hanging: set[str] = set()
        self.failing: set[str] = set()
        self.go_on = threading.Event()
        self.looks = 0
        self.look_error: Exception | None = None

    @staticmethod
    def node(name: str) -> SeenNode:
        return SeenNode(
            node_id=f"id of {name}",
            hostname=name.partition("#")[0],
            ip="127.0.0.1",
            is_head=name == "head",
            resources={"CPU": 2.0, "memory": 2.0**32},
        )

    def sweep(self, *_: Any) -> SweepReport:
        return SweepReport()

    def look(self) -> list[SeenNode]:
        self.looks += 1
        if self.look_error is not None:
            raise self.look_error
        return [*self.nodes.values()]

    def probe(
        self, node_ids: Collection[str], timeout_s: float, tell: Callable[[str, Any], None]
    ) -> None:
        names = [node_id.removeprefix("id of ") for node_id in node_ids]
        self.probed += names
        for name in sorted(names, key=lambda name: name in self.hanging):
            if name in self.hanging:
                self.go_on.wait(20)
            if name in self.failing:
                tell(f"id of {name}", ProbeResult(None, "the probe failed: no raywb"))
                continue
            versions = {"python": "3.11.7", "ray": "2.60.0"}
            facts = {"cpu_count": 16, "memory_gb": 64.0, "gpu_count": 0, "versions": versions}
            tell(f"id of {name}", ProbeResult({**facts, **self.facts.get(name, {})}))


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    monkeypatch.setattr(inventory_module, "LOOK_INTERVAL_S", 0.02)
    monkeypatch.setattr(node_reports, "LOOK_S", 0.02)
    with local_service(tmp_path) as found:
        yield found


def there(status: Status) -> dict[str, bool]:
    """Nodes that are part of the cluster, and whether each has been probed."""
    return {node.name: node.probed for node in status.nodes if node.left_s is None}


def finish(service: LocalService) -> WandbRun:
    assert service.service is not None
    report = service.service.finish(60.0, 0)
    assert report.complete, report
    return read_runs(service.directory)[report.run.id]


def table_of(run: WandbRun) -> dict[str, dict[str, Any]]:
    """The run's last table of nodes, by the node's name."""
    path = run.segments[-1].parent / "files" / run.values("raywb/nodes.path")[-1]
    table = json.loads(path.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return {row["node"]: row for row in rows}


def test_nodes_come_and_go_and_a_restart_probes_nobody_again(service: LocalService) -> None:
    """Each node is probed once in its life; every run, also a second one, has all of it."""
    machines = Machines("head", "a", "b")
    service.up(nodes=machines, node_metrics_interval_s=0)
    service.start(node_metrics_interval_s=0)
    service.wait_for(lambda status: there(status) == dict.fromkeys(("head", "a", "b"), True))
    machines.nodes["c"] = machines.node("c")
    del machines.nodes["a"]
    began = time.time()
    status = service.wait_for(
        lambda status: there(status) == dict.fromkeys(("head", "b", "c"), True)
    )
    (left,) = [node for node in status.nodes if node.left_s is not None]
    assert left.name == "a"
    assert left.left_s is not None
    assert began - 1.0 < left.left_s <= time.time()
    service.down()
    service.up(nodes=machines)
    looks = machines.looks
    service.wait_for(lambda status: machines.looks > looks + 5)
    assert there(service.status()) == dict.fromkeys(("head", "b", "c"), True)
    runs = [finish(service)]
    service.start(node_metrics_interval_s=0)
    runs.append(finish(service))
    assert sorted(machines.probed) == ["a", "b", "c", "head"]
    for run in runs:
        cluster = run.config["cluster"]
        assert (cluster["node_count"], cluster["nodes_left"], cluster["cpu_count"]) == (3, 1, 48)
        table = table_of(run)
        assert {name: row["state"] for name, row in table.items()} == {
            "head": "head",
            "a": "left",
            "b": "worker",
            "c": "worker",
        }
        assert table["a"]["left"].startswith("20")
        assert run.steps == list(range(len(run.history)))
    assert len(runs[0].values("raywb/nodes.path")) <= 2, "a restart wrote the table again"
    assert len(runs[1].values("raywb/nodes.path")) == 1


def test_a_storm_of_the_autoscaler_does_not_fill_the_run(service: LocalService) -> None:
    """Forty changes make a table or two, and the last one is true."""
    machines = Machines("head")
    service.up(nodes=machines, node_metrics_interval_s=0)
    service.start(node_metrics_interval_s=0)
    service.wait_for(lambda status: there(status) == {"head": True})
    for number in range(40):
        machines.nodes = {
            "head": machines.node("head"),
            **{f"n{k}": machines.node(f"n{k}") for k in range(max(number - 4, 0), number + 1)},
        }
        looks = machines.looks
        until("the next look", lambda: machines.looks > looks + 1)  # noqa: B023
    service.wait_for(lambda status: len(there(status)) == 6 and all(there(status).values()))
    run = finish(service)
    assert len(run.values("raywb/nodes.path")) <= 2
    assert sum(row["state"] != "left" for row in table_of(run).values()) == 6
    assert run.config["cluster"]["node_count"] == 6
    assert run.config["cluster"]["nodes_left"] == 35
    batches = (service.directory / "outbox").rglob("*")
    assert sum(path.stat().st_size for path in batches if path.is_file()) < 500_000


def test_a_probe_that_hangs_or_fails_costs_the_others_nothing(service: LocalService) -> None:
    """Facts of the others are there at once; the failed one is named, and still counted."""
    machines = Machines("head", "hangs", "fails")
    machines.hanging, machines.failing = {"hangs"}, {"fails"}
    service.up(nodes=machines, node_metrics_interval_s=0)
    service.start(node_metrics_interval_s=0)
    status = service.wait_for(
        lambda status: there(status).get("head", False) and any(n.error for n in status.nodes)
    )
    assert there(status) == {"head": True, "hangs": False, "fails": False}
    assert status.warnings == [
        "1 of 3 nodes could not be probed (fails: the probe failed: no raywb)"
    ]
    machines.look_error = RuntimeError("the control store is gone")
    status = service.wait_for(lambda status: bool(status.problems))
    assert "cannot be looked at: the control store is gone" in status.problems[0]
    machines.look_error = None
    service.wait_for(lambda status: not status.problems)
    machines.go_on.set()
    service.wait_for(lambda status: there(status)["hangs"])
    run = finish(service)
    assert sorted(machines.probed) == ["fails", "hangs", "head"]
    cluster = run.config["cluster"]
    assert (cluster["node_count"], cluster["nodes_unprobed"]) == (3, 1)
    assert cluster["cpu_count"] == 16 + 16 + 2
    assert table_of(run)["fails"]["problem"] == "the probe failed: no raywb"


def test_versions_that_differ_are_a_warning_in_status_and_in_wandb(service: LocalService) -> None:
    """Once, also after a restart of the service."""
    machines = Machines("head", "a")
    machines.facts["a"] = {"versions": {"python": "3.11.7", "ray": "2.59.0"}}
    service.up(nodes=machines, node_metrics_interval_s=0)
    service.start(node_metrics_interval_s=0)
    status = service.wait_for(lambda status: bool(status.warnings))
    (first,) = status.warnings
    assert first == "nodes differ in ray: 2.59.0 on 1 node, 2.60.0 on 1 node (a)"
    assert first in printed(status)
    time.sleep(0.2)
    service.down()
    service.up(nodes=machines)
    machines.nodes["b"] = machines.node("b")
    service.wait_for(lambda status: there(status).get("b", False))
    warning = service.status().warnings[0]
    run = finish(service)
    assert run.config["cluster"]["node_count"] == 3
    assert run.alerts == [("Versions of ray differ", first)]
    assert run.config["cluster"]["version_skew"] == {"ray": warning}
    assert run.config["cluster"]["versions"]["ray"] == {"2.59.0": 1, "2.60.0": 2}


def test_a_users_own_config_is_left_alone(service: LocalService) -> None:
    """Whoever has put something else under ``cluster`` keeps it, and the status says so."""
    machines = Machines()
    service.up(nodes=machines, node_metrics_interval_s=0)
    service.start(node_metrics_interval_s=0)
    client = service.client()
    client.config.update({"cluster": "mine"})
    assert client.flush()
    service.wait_for(lambda status: status.sink.state == "running")
    time.sleep(0.2)
    machines.nodes["head"] = machines.node("head")
    status = service.wait_for(lambda status: bool(status.problems))
    assert status.problems == [
        "the run's config has a 'cluster' of somebody else: the nodes are not in it"
    ]
    client.close()
    run = finish(service)
    assert run.config["cluster"] == "mine"
    assert table_of(run)["head"]["state"] == "head"


def printed(status: Status) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_status(status))
    return console.export_text()


def test_the_status_shows_nodes_one_by_one_or_summed_up(service: LocalService) -> None:
    """Ten nodes are listed, more are counted by what they are; who left is named with the time."""
    machines = Machines("head", "a", "a#2", "gone")
    machines.facts["a"] = {
        "gpu_count": 8,
        "gpus": [{"name": "NVIDIA H100"}] * 8,
        "cloud": {"instance_type": "p5.48xlarge", "market_type": "spot"},
    }
    service.up(nodes=machines, node_metrics_interval_s=0)
    service.start(node_metrics_interval_s=0)
    service.wait_for(lambda status: len(there(status)) == 4 and all(there(status).values()))
    del machines.nodes["gone"]
    status = service.wait_for(lambda status: len(there(status)) == 3)
    text = printed(status)
    assert "head (head)" in text
    assert "a-id of a" in text, "two nodes of one hostname have one name"
    assert "p5.48xlarge (spot)  16    64 GB   8 x NVIDIA H100" in text
    assert "1 left: gone at " in text
    decoded = msgspec.json.decode(msgspec.json.encode(status))
    assert decoded["nodes"][0]["facts"]["cpu_count"] == 16
    machines.nodes |= {f"n{number}": machines.node(f"n{number}") for number in range(40)}
    status = service.wait_for(
        lambda status: len(there(status)) == 43 and all(there(status).values())
    )
    lines = [line.split() for line in printed(status).splitlines()]
    assert ["42", "-", "16", "64", "GB", "-", "python", "3.11.7,", "ray", "2.60.0"] in lines
    assert sum("p5.48xlarge" in line for line in lines) == 1


def test_what_is_kept_and_cannot_be_read_is_asked_again(tmp_path: Path) -> None:
    """Damage, or another cluster's nodes, cost a probe and nothing else."""
    machines = Machines("a")
    kept = Inventory(tmp_path, CLUSTER.cluster_id, machines)
    kept.note(machines.look())
    kept.nodes["id of a"].facts = {"cpu_count": 1}
    kept._save()
    assert Inventory(tmp_path, CLUSTER.cluster_id, machines).nodes == kept.nodes
    assert Inventory(tmp_path, "another", machines).nodes == {}
    path = tmp_path / inventory_module.FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"cpu_count":1', b'"cpu_count":9'))
    assert Inventory(tmp_path, CLUSTER.cluster_id, machines).nodes == {}


def test_a_node_that_comes_back_is_known(tmp_path: Path) -> None:
    """By its id it is the same node; a new one in its place goes on with its series."""
    machines = Machines("a")
    now_s = 100.0
    inventory = Inventory(tmp_path, "c", machines, clock=lambda: now_s)
    inventory.note(machines.look())
    inventory.nodes["id of a"].facts = {"cpu_count": 1}
    inventory.note([])
    assert inventory.nodes["id of a"].left_s == 100.0
    assert inventory.due() == []
    inventory.note(machines.look())
    assert inventory.nodes["id of a"].is_alive
    assert inventory.due() == []
    inventory.note([machines.node("a#2")])
    assert inventory.nodes["id of a#2"].name == "a"
    assert inventory.due() == ["id of a#2"]
    assert inventory.left == 1


def test_those_that_left_are_forgotten_one_day(tmp_path: Path) -> None:
    """Memory does not grow with a cluster that changes for months; the count holds."""
    machines = Machines()
    inventory = Inventory(tmp_path, "c", machines)
    for number in range(inventory_module.MOST_LEFT + 300):
        inventory.note([machines.node(f"n{number}")])
    assert len(inventory.nodes) == inventory_module.MOST_LEFT + 1
    assert inventory.left == inventory_module.MOST_LEFT + 299
    assert "id of n0" not in inventory.nodes
