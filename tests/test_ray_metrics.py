"""Ray's metrics on a real cluster: scraped by a real Prometheus, asked as Grafana's panels ask.

Ray exports ten times as fast here as it does by default, and Prometheus gives each scrape a second
only. On a busy machine either may miss a value now and then, which shows as a gap, so every value
is waited for.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from nvml_stub import StubGpu, build_nvml
from prometheus_server import DISCOVERY_FILE, Prometheus, lint, require_prometheus
from ray_cluster import Driver, RayCluster, until

from raywb.service.ray_metrics_sink import MAX_SERIES
from raywb.view.grafana.dashboard import dashboard

pytestmark = pytest.mark.ray

#: Exports of Ray's workers, in seconds; ten times as fast as by default, so that ends come soon.
EXPORT_S = 1.0

#: Labels that Ray adds to every series.
RAYS_LABELS = re.compile(r'(Component|NodeAddress|SessionName|Version|WorkerId)="[^"]*",?')

#: Longest that a value is waited for, in seconds; on a quiet machine it takes 3 or 4.
LIMIT_S = 90.0

#: Pipelines, a stage of two ranks, one with a run of its own, nodes, and a loss.
WORK = """
import threading, time
import ray, raywb
from ray_cluster import report, told

ray.init()
run = raywb.start(project="demo", name="tidy", mode="offline", node_metrics_interval_s=1.0)
hook = raywb.attach()
gone = raywb.attach()
gone.close()
gone.log({"late": 1})
ranks = [raywb.attach("training/a", rank=rank, world_size=2) for rank in range(2)]
alone = raywb.attach("classify", own_run=True, run_id="own00001")
progress = {"xenna": 40.0, "xenna/sft_2": 10.0, "xenna/short": 60.0}

def pipeline(name, seconds):
    stage = {"actors_ready": 2, "actors_pending": 1, "tasks_completed": seconds, "queue_in": 3,
             "queue_out": 1, "slots_used": 3, "slots_empty": 1, "speed_tasks_per_s": 2.5,
             "resource/cpu_util_pct": 150.0, "resource/mem_gb": 2.0}
    row = {"pipeline_duration_s": seconds, "main_loop_rate_hz": 1.0, "progress": progress[name],
           "num_input_remaining": 5, "num_outputs": seconds, "inputs_processed_per_s": 1.5,
           "outputs_per_s": 1.25, "bottleneck_stage_index": 1}
    row |= {f"stage/{part}/{key}": value for part in ("plan_stage", "download_stage")
            for key, value in stage.items()}
    return {f"{name}/{key}": value for key, value in row.items()}

def work():
    seconds = 0
    while True:
        time.sleep(0.3)
        seconds += 1
        for name in list(progress):
            hook.log(pipeline(name, seconds))
            if progress[name] == 100.0:
                del progress[name]
        for rank, client in enumerate(ranks):
            client.log({"loss": 1.0 / seconds, "lérning rate": 0.5}, step=seconds)
        alone.log({"accuracy": 0.75}, step=seconds)

threading.Thread(target=work, daemon=True).start()
report(run.id)
while asked := told():
    if asked == "pipeline":
        progress["xenna/short"] = 100.0
    elif asked == "many":
        for stage in range(60):
            hook.log({f"many/{stage:02}/{key:02}": 1.0 for key in range(64)})
        hook.flush()
    status = raywb.status()
    report([status.warnings, status.problems])
"""


class Watched(NamedTuple):
    cluster: RayCluster
    prometheus: Prometheus
    driver: Driver
    run_id: str

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        return self.prometheus.ask(query)

    def expect(self, query: str, *values: float) -> list[dict[str, str]]:
        """Wait until a query yields these values; returns the labels of each."""

        def asked() -> list[dict[str, str]] | None:
            found = sorted(self.ask(query), key=lambda one: one[1])
            if [value for _, value in found] != sorted(values):
                return None
            return [labels for labels, _ in found]

        return until(f"{query} to yield {values}", asked, timeout_s=LIMIT_S)

    def expect_end(self, query: str) -> None:
        """Wait until a query yields nothing any more."""
        until(f"{query} to end", lambda: not self.ask(query), timeout_s=LIMIT_S)

    def tell(self, what: str) -> Any:
        self.driver.tell(what)
        return self.driver.next_report()

    def exposed(self) -> str:
        """raywb's lines of what the agents of all nodes answer."""
        [listed] = json.loads((self.cluster.root / "ray" / DISCOVERY_FILE).read_text())
        found = []
        for target in listed["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                found += answer.read().decode().splitlines(keepends=True)
        return "".join(line for line in found if "ray_raywb_" in line)

    def actors(self) -> list[dict[str, Any]]:
        """What ``ray list actors`` and the dashboard show."""
        url = f"{self.cluster.dashboard_address}/api/v0/actors?detail=1"
        with urllib.request.urlopen(url, timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        return [one for one in found if one["name"] == "raywb" and one["state"] == "ALIVE"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A head with a GPU, as far as NVIDIA's driver is concerned, at work, and watched."""
    require_prometheus()
    gpus = build_nvml(tmp_path_factory.mktemp("nvml"), [StubGpu()])
    environment = {
        "LD_LIBRARY_PATH": str(gpus),
        "RAY_metrics_report_interval_ms": str(int(1e3 * EXPORT_S)),
    }
    directory = tmp_path_factory.mktemp("prometheus")
    with RayCluster.start(num_cpus=2, dashboard=True, environment=environment) as cluster:
        discovery = cluster.root / "ray" / DISCOVERY_FILE
        with Prometheus.start(directory, discovery=discovery) as prometheus:
            driver = cluster.driver(WORK)
            watched = Watched(cluster, prometheus, driver, driver.next_report())
            # What there is when too many series come is not left out: each test finds it.
            loss = 'ray_raywb_stage_value{metric="loss"}'
            until("the first values", lambda: watched.ask(loss), timeout_s=LIMIT_S)
            yield watched


def substituted(query: str, metric: str = "loss") -> str:
    """A panel's query as Grafana sends it when everything is chosen."""
    values = {"SessionName": ".*", "run": ".*", "metric": metric, "__rate_interval": "10s"}
    for name, value in values.items():
        query = query.replace(f"${name}", value)
    assert "$" not in query
    return query


def panels() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


@pytest.mark.parametrize("query", panels())
def test_every_query_of_the_dashboard_returns_data(watched: Watched, query: str) -> None:
    """Each panel has something to show while there is work of its kind."""
    until(query, lambda: watched.ask(substituted(query)), timeout_s=LIMIT_S)


def test_every_variable_of_the_dashboard_has_values(watched: Watched) -> None:
    """There is a session, a run and a value to choose above the panels."""
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(
                r"label_values\((.+), (\w+)\)", variable["definition"]
            ).groups()
            labels, match = watched.prometheus.labels, substituted(series)
            until(variable["name"], functools.partial(labels, label, match), timeout_s=LIMIT_S)


def test_values_and_labels_are_those_of_the_rows(watched: Watched) -> None:
    """Prometheus has the pipelines' and the stages' own numbers, under labels that Ray takes."""
    prefix = f'ray_raywb_pipeline_stage_queue{{run="{watched.run_id}", pipeline="xenna/sft_2"'
    watched.expect(f'{prefix}, stage="download_stage", side="in"}}', 3)
    [labels] = watched.expect(
        'ray_raywb_pipeline_stage_memory_bytes{pipeline="xenna", stage="plan_stage"}', 2 * 2**30
    )
    assert {"SessionName", "WorkerId"} <= labels.keys()
    [labels] = watched.expect('ray_raywb_pipeline_stage_bottleneck{pipeline="xenna"} == 1', 1)
    assert labels["stage"] == "download_stage"
    watched.expect('ray_raywb_stage_ranks{stage="training/a", state="attached"}', 2)
    # A stage with a run of its own has no prefix among its keys, so its name comes from the run.
    [labels] = watched.expect('ray_raywb_stage_value{run="own00001", metric="accuracy"}', 0.75)
    assert labels["stage"] == "classify"
    metrics = watched.prometheus.labels("metric", 'ray_raywb_stage_value{stage="training/a"}')
    assert [re.sub("~[0-9a-f]{8}$", "~", name) for name in metrics] == ["lerning rate~", "loss"]
    [info] = watched.expect(f'ray_raywb_run_info{{run="{watched.run_id}"}}', 1)
    assert (info["name"], info["project"], info["mode"]) == ("tidy", "demo", "offline")


def test_names_follow_prometheus_conventions(watched: Watched) -> None:
    """promtool finds nothing to say of what Ray's agent exposes."""

    def exposed() -> str | None:
        text = watched.exposed()
        return text if "# HELP ray_raywb_rows_received" in text else None

    # Ray's own labels are not in snake case, which is no fault of ours.
    assert lint(RAYS_LABELS.sub("", until("raywb's lines", exposed, LIMIT_S))) == ""


def test_a_finished_pipeline_ends(watched: Watched) -> None:
    """Its last state is seen, then its series end; those of the other one go on."""
    of_it = '{__name__=~"ray_raywb_pipeline_.*", pipeline="xenna/short"}'
    percent = 'ray_raywb_pipeline_percent{pipeline="xenna/short"}'
    watched.expect(percent, 60)
    watched.tell("pipeline")
    watched.expect(f"max_over_time({percent}[5m])", 100)
    watched.expect_end(of_it)
    watched.expect('ray_raywb_pipeline_percent{pipeline="xenna/sft_2"}', 10)


def test_raywb_grafana_writes_where_grafana_looks(watched: Watched) -> None:
    """The dashboard lies among Ray's own; what an earlier run left there is replaced."""
    [folder] = watched.cluster.root.glob("ray/session_2*/metrics/grafana/dashboards")
    others = {path: path.read_text() for path in folder.iterdir()}
    ours = folder / "raywb_grafana_dashboard.json"
    ours.write_text("that of an older version")
    done = subprocess.run(
        [sys.executable, "-m", "raywb", "grafana"],
        env=watched.cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"✓ replaced {ours}" in done.stdout
    assert json.loads(ours.read_text())["uid"] == "raywb"
    ours.unlink()
    assert {path: path.read_text() for path in folder.iterdir()} == others
    config = re.findall(r"--config[ .](?:file=)?(\S+)", done.stdout)
    assert len(config) == 2
    assert all(Path(path).exists() for path in config)


def test_a_service_that_was_killed_goes_on_with_the_same_lines(watched: Watched) -> None:
    """The actor shows its run, also after a restart, and a panel's line does not split."""
    line = 'max by (run, pipeline) (ray_raywb_pipeline_percent{pipeline="xenna/sft_2"})'
    labels = watched.expect(line, 10)
    [before] = watched.actors()
    assert before["repr_name"].startswith(f"raywb demo/{watched.run_id} tidy offline /")
    process = watched.cluster.service()
    assert process is not None
    process.kill()
    watched.expect("max(ray_raywb_service_starts)", 2)
    assert watched.expect(line, 10) == labels
    [after] = watched.actors()
    assert (after["num_restarts"], after["repr_name"]) == ("1", before["repr_name"])


def test_series_beyond_the_limit_are_counted(watched: Watched) -> None:
    """Ray gets so many and no more; the status and a gauge say how many others there are."""
    # The last test of the file: the flood stays, and a service that were started again in it could
    # leave out values that the others ask for.
    watched.tell("many")
    watched.expect("ray_raywb_series_exported", MAX_SERIES)
    dropped = "ray_raywb_series_dropped > 1000"
    until(dropped, lambda: watched.ask(dropped), timeout_s=LIMIT_S)
    assert watched.exposed().count("\nray_raywb_") <= MAX_SERIES
    received = f'ray_raywb_rows_received{{run="{watched.run_id}"}}'
    until("what matters most to stay", lambda: watched.ask(received), timeout_s=LIMIT_S)
    warnings, problems = watched.tell("status")
    assert [one for one in warnings if "most of them of raywb_stage_value" in one]
    assert problems == []
