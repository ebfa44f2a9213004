"""A real Prometheus on this machine, in a directory and on a port of its own.

    with Prometheus.start(tmp_path, discovery=cluster.root / "ray" / DISCOVERY_FILE) as prometheus:
        [series] = prometheus.ask('max by (pipeline) (ray_raywb_pipeline_percent)')

It is Debian's `prometheus`, not as a service, with its own configuration.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import until

__all__ = ["DISCOVERY_FILE", "PROGRAMS", "Prometheus", "lint", "require_prometheus"]

PROGRAMS = ("prometheus", "promtool")

#: Ray's list of what is to be scraped, in the directory of all of its sessions.
DISCOVERY_FILE = "prom_metrics_service_discovery.json"

_CONFIGURATION = """
global:
  scrape_interval: 1s
  scrape_timeout: 1s
scrape_configs:
  - job_name: ray
    file_sd_configs:
      - files: ['{discovery}']
        refresh_interval: 1s
"""


def require_prometheus() -> None:
    """Skip where this machine has none; where the tests are the gate, that is an error."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return
    text = f"no {', '.join(missing)} on this machine: apt-get install prometheus"
    if os.environ.get("CI"):
        raise RuntimeError(text)
    pytest.skip(text)


class Prometheus:
    """A running server; made by :meth:`start`."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    @classmethod
    @contextlib.contextmanager
    def start(cls, directory: Path, *, discovery: Path) -> Iterator[Prometheus]:
        """Start one that scrapes, every second, what a file of Ray's lists.

        Args:
            directory: for its configuration and its data.
            discovery: Ray's list.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        configuration = directory / "prometheus.yml"
        configuration.write_text(_CONFIGURATION.format(discovery=discovery))
        log = directory / "prometheus.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        server = cls(port)
        try:
            until("Prometheus to start", lambda: process.poll() is not None or server._is_ready())
            assert process.poll() is None, log.read_text()
            yield server
        finally:
            process.kill()
            process.wait()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """The series that a query yields now, each with its labels and its value."""
        found = self._get("query", query=query)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def labels(self, label: str, match: str) -> list[str]:
        """What Grafana's ``label_values`` yields for a variable."""
        values = self._get(f"label/{label}/values", **{"match[]": match})
        return [str(value) for value in values]

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error


def lint(exposed: str) -> str:
    """What ``promtool check metrics`` finds in a text of Prometheus' format; empty: nothing."""
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=exposed,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout + done.stderr
