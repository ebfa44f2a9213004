"""Where the metrics go: Datadog, a file, a scraper, Ray's own metrics. One failing stops no other.

An outlet takes a whole report. What a collection leaves out (a mean without a value) is not sent,
and whatever shows the last value of a gauge stops to show it.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raywb.errors import FleetError, FleetTimeout
from raywb.fleet.collector import FleetReport
from raywb.fleet.credentials import Credentials
from raywb.fleet.deadline import Deadline, within
from raywb.fleet.metrics import METRICS, Metric

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["DatadogOutlet", "FileOutlet", "Outlet", "RayOutlet", "publish", "registry_of"]

#: Series in one request to Datadog, whose limit is 500 kB (5 MB unpacked): far below it.
SERIES_PER_REQUEST = 500

#: How often a request to Datadog is tried again, after an error of the server or of the network.
DATADOG_RETRIES = 4

#: Longest wait for one answer of Datadog's, in seconds.
DATADOG_TIMEOUT_S = 30.0

#: How much is told of what went wrong, in characters; cut after the keys are masked, since a part
#: of a key would not be found.
LONGEST_TEXT = 500


class Outlet(Protocol):
    """Takes a report somewhere."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    def publish(self, report: FleetReport, credentials: Credentials) -> None:
        """Take the report there; raises whatever goes wrong."""


def publish(
    report: FleetReport, outlets: Sequence[Outlet], credentials: Credentials, deadline: Deadline
) -> dict[str, str]:
    """Give a report to every outlet, all at once; returns what went wrong, by outlet.

    Each has a thread of its own, which is left alone when the time is over.
    """
    failures: dict[str, str] = {}

    def one(outlet: Outlet) -> None:
        try:
            within(deadline, outlet.name, lambda: outlet.publish(report, credentials))
        except FleetTimeout:
            failures[outlet.name] = f"it took nothing within {deadline.limit_s:g} s"
        except Exception as error:  # noqa: BLE001 - the others go on, and this one is told
            failures[outlet.name] = _one_line(credentials.redact(_text(error)))[:LONGEST_TEXT]

    threads = [threading.Thread(target=one, args=(outlet,), daemon=True) for outlet in outlets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _one_line(text: str) -> str:
    """A text in one line; those of HTTP clients' errors have headers and bodies over many."""
    return " ".join(text.split())


class DatadogOutlet:
    """Gauges for Datadog's v2 series API.

    Args:
        tags: further tags, as in ``team:robots``.
        per_request: series in one request.
        backoff_s: pause before the second retry; it doubles with each.
    """

    name = "Datadog"

    def __init__(
        self,
        tags: Sequence[str] = (),
        *,
        per_request: int = SERIES_PER_REQUEST,
        backoff_s: float = 1.0,
    ) -> None:
        self._tags = list(tags)
        self._per_request = per_request
        self._backoff_s = backoff_s

    def publish(self, report: FleetReport, credentials: Credentials) -> None:
        """Send every metric with the window's end as its time: sent twice, it is there once.

        Raises:
            FleetError: Datadog does not take a request.
        """
        from datadog_api_client import ApiClient, Configuration
        from datadog_api_client.exceptions import ApiException
        from datadog_api_client.rest import ClientRetry
        from datadog_api_client.v2.api.metrics_api import MetricsApi
        from datadog_api_client.v2.model.metric_payload import MetricPayload
        from urllib3.exceptions import HTTPError

        key = credentials.datadog_key
        if key is None:
            raise FleetError("DD_API_KEY is not set")
        # An address given stands in for the one that Datadog's client makes of the site.
        configuration = Configuration(
            host=credentials.datadog_url,
            api_key={"apiKeyAuth": key.reveal()},
            retry_policy=ClientRetry(
                DATADOG_RETRIES, backoff_factor=self._backoff_s, raise_on_status=False
            ),
            request_timeout=DATADOG_TIMEOUT_S,
        )
        configuration.server_variables["site"] = credentials.datadog_site
        series = [self._series(metric, report) for metric in report.metrics]
        with ApiClient(configuration) as client:
            api = MetricsApi(client)
            for start in range(0, len(series), self._per_request):
                batch = series[start : start + self._per_request]
                try:
                    answer: Any = api.submit_metrics(body=MetricPayload(series=batch))
                except ApiException as error:
                    sent = f"{start} of {len(series)} metrics were sent before"
                    text = f"it answered {error.status} {error.reason} ({error.body}; {sent})"
                    raise FleetError(text) from None
                except HTTPError as error:
                    raise FleetError(f"it cannot be reached: {_text(error)}") from None
                if answer.get("errors"):
                    raise FleetError(f"it refused metrics: {answer.errors}")

    def _series(self, metric: Metric, report: FleetReport) -> Any:
        from datadog_api_client.v2.model.metric_intake_type import MetricIntakeType
        from datadog_api_client.v2.model.metric_point import MetricPoint
        from datadog_api_client.v2.model.metric_series import MetricSeries

        return MetricSeries(
            metric=metric.name,
            type=MetricIntakeType.GAUGE,
            points=[MetricPoint(timestamp=int(report.window.end_s), value=float(metric.value))],
            tags=[f"entity:{report.entity}", f"project:{report.project}", *self._tags],
        )


def registry_of(report: FleetReport) -> CollectorRegistry:
    """A report as gauges for Prometheus; ``wandb.runs.active`` becomes ``wandb_runs_active``."""
    from prometheus_client import CollectorRegistry, Gauge

    registry = CollectorRegistry()
    for metric in report.metrics:
        meaning = METRICS[metric.name][0]
        gauge = Gauge(prometheus_name(metric.name), meaning, _LABELS, registry=registry)
        gauge.labels(report.entity, report.project).set(metric.value)
    return registry


_LABELS = ("entity", "project")


def prometheus_name(name: str) -> str:
    """A metric's name as Prometheus allows it."""
    return name.replace(".", "_")


class FileOutlet:
    """OpenMetrics text in a file, which is there whole or not at all.

    Args:
        path: the file; a node exporter's textfile directory is a good place.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self._path)

    def publish(self, report: FleetReport, credentials: Credentials) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written.
        """
        from prometheus_client.openmetrics.exposition import generate_latest

        text = generate_latest(registry_of(report))
        with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                Path(file.name).replace(self._path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise


class RayOutlet:
    """``ray.util.metrics`` gauges, beside Ray's own; only inside a process of a Ray cluster."""

    name = "Ray's metrics"

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {
            name: Gauge(prometheus_name(name), description=meaning, tag_keys=_LABELS)
            for name, (meaning, _) in METRICS.items()
        }
        self._shown: set[str] = set()

    def publish(self, report: FleetReport, credentials: Credentials) -> None:
        """Set the gauges; one that was set before and has no value now becomes NaN."""
        tags = dict(zip(_LABELS, (report.entity, report.project), strict=True))
        values = {metric.name: float(metric.value) for metric in report.metrics}
        for name in self._shown - values.keys():
            self._gauges[name].set(math.nan, tags=tags)
        for name, value in values.items():
            self._gauges[name].set(value, tags=tags)
        self._shown = set(values)
