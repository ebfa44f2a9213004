"""`raywb fleet --on-cluster`: an actor on the head that takes nothing from the work."""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Iterator

import pytest
from fleet_runs import ENTITY, PROJECT, put_run
from prometheus_client.parser import text_string_to_metric_families
from ray_cluster import RayCluster, until
from wandb_client import API_KEY
from wandb_server import WandbServer

pytestmark = pytest.mark.ray

COMMAND = """
    import sys
    from raywb.cli import main
    main(["fleet", "--on-cluster", *%r])
"""

LOOK = """
    import ray
    from ray_cluster import report, told
    from raywb.cluster import call
    ray.init(address="auto", log_to_driver=False)
    free = ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    (node,) = ray.nodes()
    actor = ray.get_actor("raywb-fleet", namespace="raywb")
    count, outcome = call(actor, "last", 0, 60, timeout_s=60)
    report([free, f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"])
    told()
    count, values = 0, {}
    while count < 60 and values.get("wandb.runs.completed_24h") != 2:
        # On a busy machine one that was just started may not be through in time: it tries again.
        count, outcome = call(actor, "last", count, 60, timeout_s=60)
        if not isinstance(outcome, Exception):
            values = {metric.name: metric.value for metric in outcome.report.metrics}
    report(values)
    told()
    count, outcome = call(actor, "last", 0, 60, timeout_s=60)
    report(str(outcome) if isinstance(outcome, Exception) else "no error")
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer(entity=ENTITY) as server:
        put_run(server.store, "r", name="github.sky.main.x", summary={"overview/sps": 9.0})
        yield server


def fleet(cluster: RayCluster, server: WandbServer, *arguments: str, **further: str) -> int:
    """Run the command as a driver of the cluster; returns its exit code."""
    environment = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": server.url}
    environment |= {"WANDB_ENTITY": ENTITY, "WANDB_PROJECT": PROJECT, **further}
    driver = cluster.driver(COMMAND % (list(arguments),), environment)
    code = driver.wait()
    assert API_KEY not in driver.output
    return code


def gauges(address: str) -> dict[str, float]:
    """What Ray's own endpoint shows of ours."""
    with urllib.request.urlopen(address, timeout=10) as response:
        text = response.read().decode()
    assert API_KEY not in text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ray_wandb_") and sample.labels.get("project") == PROJECT
    }


def test_beside_the_service(cluster: RayCluster, server: WandbServer) -> None:
    """It outlives the command, collects again, survives a kill, and shows Ray its metrics."""
    assert fleet(cluster, server, "--every", "1s", "--limit-s", "30") == 0
    look = cluster.driver(LOOK)
    free, address = look.next_report()
    assert free
    shown = until("Ray's endpoint to show the gauges", lambda: gauges(address))
    assert shown["ray_wandb_runs_completed_24h"] == 1
    assert shown["ray_wandb_push_to_main_overview_sps"] == 9
    # What has no value any more is not shown with its last one.
    server.runs[f"{ENTITY}/{PROJECT}/r"].summary.clear()
    name = "ray_wandb_push_to_main_overview_sps"
    until("the gauge to go", lambda: math.isnan(gauges(address).get(name, math.nan)))
    (actor,) = cluster.processes("raywb-fleet") or cluster.processes("FleetActor")
    actor.kill()
    put_run(server.store, "second")
    look.tell()
    assert look.next_report()["wandb.runs.completed_24h"] == 2
    server.misbehave("graphql", status=403)
    until("a collection to fail", lambda: server.disturbed["graphql"] >= 1)
    look.tell()
    assert API_KEY not in look.succeed()
    assert fleet(cluster, server, "--stop") == 0
    assert not cluster.processes("FleetActor")


def test_a_wrong_key(cluster: RayCluster, server: WandbServer) -> None:
    """A first collection that fails ends the actor, and the command with the error's code."""
    server.api_key = "f" * 40
    assert fleet(cluster, server, "--limit-s", "30") == 20
    until("the actor to end", lambda: not cluster.processes("FleetActor"))
