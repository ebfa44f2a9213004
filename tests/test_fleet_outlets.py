"""The metrics reach Datadog, a file and a scraper, and one that fails stops no other."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from datadog_server import DatadogServer
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from raywb.errors import FleetError
from raywb.fleet.collector import FleetReport
from raywb.fleet.credentials import Credentials, Secret
from raywb.fleet.deadline import Deadline
from raywb.fleet.metrics import METRICS, Metric
from raywb.fleet.outlets import DatadogOutlet, FileOutlet, publish
from raywb.fleet.runs import Window
from raywb.fleet.scrape import ScrapeOutlet

DATADOG_KEY = "d" * 32


def report(**values: float) -> FleetReport:
    """A report with every metric, its value the place that it has, or as given."""
    numbered = {name: values.get(name, index) for index, name in enumerate(METRICS)}
    return FleetReport(
        entity="robots",
        project="sky",
        window=Window.until(time.time(), 24),
        metrics=[Metric(name, value) for name, value in numbered.items()],
        runs=1,
        requests=1,
        read_s=0.1,
        notes=[],
        incomplete=[],
    )


@pytest.fixture
def datadog() -> Iterator[DatadogServer]:
    with DatadogServer(DATADOG_KEY) as server:
        yield server


def credentials(datadog: DatadogServer, key: str = DATADOG_KEY) -> Credentials:
    found = {"WANDB_API_KEY": "w" * 40, "DD_API_KEY": key, "DD_URL": datadog.url}
    return Credentials({name: Secret(value) for name, value in found.items()})


def test_datadog(datadog: DatadogServer) -> None:
    """Every metric arrives as a gauge at the window's end, tagged, in one request."""
    given = report()
    DatadogOutlet(["team:robots"]).publish(given, credentials(datadog))
    (batch,) = datadog.batches
    assert [one["metric"] for one in batch] == list(METRICS)
    at = int(given.window.end_s)
    assert [one["points"] for one in batch] == [
        [{"timestamp": at, "value": index}] for index in range(len(METRICS))
    ]
    tags = ["entity:robots", "project:sky", "team:robots"]
    assert all(one["tags"] == tags for one in batch)


def test_datadog_in_batches(datadog: DatadogServer) -> None:
    """More than fits into one request goes in several."""
    DatadogOutlet(per_request=8).publish(report(), credentials(datadog))
    assert [len(batch) for batch in datadog.batches] == [8, 8, 4]
    assert list(datadog.series) == list(METRICS)


def test_datadog_tries_again(datadog: DatadogServer) -> None:
    """Errors of the server and its throttling are outlasted."""
    datadog.answers = [(500, {}), (429, {"X-Ratelimit-Reset": "1"}), (503, {})]
    DatadogOutlet(backoff_s=0.01).publish(report(), credentials(datadog))
    assert datadog.requests == 4
    assert len(datadog.series) == len(METRICS)


def test_datadog_gives_up(datadog: DatadogServer) -> None:
    """A server that goes on failing, and one that is not there, are told."""
    datadog.answers = [(500, {})] * 20
    with pytest.raises(FleetError, match="500"):
        DatadogOutlet(backoff_s=0.01).publish(report(), credentials(datadog))
    assert 2 <= datadog.requests <= 6
    gone = Credentials({"DD_API_KEY": Secret("x"), "DD_URL": Secret("http://127.0.0.1:9")})
    with pytest.raises(FleetError, match="cannot be reached"):
        DatadogOutlet(backoff_s=0.01).publish(report(), gone)


def test_datadog_refuses(datadog: DatadogServer) -> None:
    """A key that Datadog does not know is told at once, without the key."""
    with pytest.raises(FleetError, match="403") as caught:
        DatadogOutlet().publish(report(), credentials(datadog, "e" * 32))
    assert "e" * 32 not in str(caught.value)
    assert datadog.requests == 1


def test_file(tmp_path: Path) -> None:
    """The file is OpenMetrics text, replaced as a whole, readable by all."""
    path = tmp_path / "wandb.prom"
    outlet = FileOutlet(path)
    outlet.publish(report(), Credentials({}))
    outlet.publish(report(**{"wandb.runs.active": 7}), Credentials({}))
    families = {family.name: family for family in openmetrics(path.read_text())}
    assert list(families) == [name.replace(".", "_") for name in METRICS]
    (sample,) = families["wandb_runs_active"].samples
    assert (sample.value, sample.labels) == (7, {"entity": "robots", "project": "sky"})
    assert [item.name for item in tmp_path.iterdir()] == ["wandb.prom"]
    assert path.stat().st_mode & 0o777 == 0o644


def scraped(outlet: ScrapeOutlet, path: str = "/metrics", accept: str = "") -> tuple[str, str]:
    request = urllib.request.Request(f"http://{outlet.address}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.headers["Content-Type"], response.read().decode()


def test_scraping() -> None:
    """Prometheus gets the last report in the format that it asks for; a stale one is no report."""
    outlet = ScrapeOutlet("127.0.0.1", 0, fresh_s=60)
    try:
        with pytest.raises(urllib.error.HTTPError, match="503"):
            scraped(outlet)
        outlet.publish(report(**{"wandb.runs.active": 7}), Credentials({}))
        kind, text = scraped(outlet)
        assert kind.startswith("text/plain")
        values = {f.name: f.samples[0].value for f in prometheus(text)}
        assert len(values) == len(METRICS)
        assert values["wandb_runs_active"] == 7
        kind, text = scraped(outlet, accept="application/openmetrics-text; version=1.0.0")
        assert kind.startswith("application/openmetrics-text")
        assert len(list(openmetrics(text))) == len(METRICS)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scraped(outlet, "/")
        # A metric that is left out later is not shown any more.
        later = report()
        del later.metrics[0]
        outlet.publish(later, Credentials({}))
        assert "wandb_runs_active" not in scraped(outlet)[1]
        outlet._fresh_s = 0.0
        with pytest.raises(urllib.error.HTTPError, match="503"):
            scraped(outlet)
    finally:
        outlet.close()


def test_one_failing_outlet_stops_no_other(datadog: DatadogServer, tmp_path: Path) -> None:
    """Whichever fails, hangs or trickles, the others have the report, within the time."""

    class Hanging:
        name = "hanging"

        def publish(self, report: FleetReport, credentials: Credentials) -> None:
            threading.Event().wait(60)

    class Broken:
        name = "broken"

        def publish(self, report: FleetReport, credentials: Credentials) -> None:
            # Where it is cut lies in the middle of the second key.
            key = credentials.wandb_key.reveal()
            raise RuntimeError(f"no good: {key} {'x' * 410} {key}")

    datadog.trickles = True
    good = FileOutlet(tmp_path / "good")
    bad = FileOutlet(tmp_path / "no such directory" / "bad")
    outlets = [Hanging(), Broken(), DatadogOutlet(), bad, good]
    began = time.monotonic()
    failures = publish(report(), outlets, credentials(datadog), Deadline(1.5))
    assert time.monotonic() - began < 3
    assert (tmp_path / "good").exists()
    assert failures.pop("broken") == f"RuntimeError: no good: *** {'x' * 410} ***"
    assert "No such file" in failures.pop(bad.name)
    assert failures == dict.fromkeys(["hanging", "Datadog"], "it took nothing within 1.5 s")
