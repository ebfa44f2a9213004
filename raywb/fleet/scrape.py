"""An HTTP endpoint for Prometheus to scrape: the last report, as long as it is fresh."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from raywb.fleet.collector import FleetReport
from raywb.fleet.credentials import Credentials
from raywb.fleet.outlets import registry_of

__all__ = ["ScrapeOutlet"]


class ScrapeOutlet:
    """Serves ``/metrics``.

    A report that is older than ``fresh_s`` is answered with 503: so a collector that fails turns
    Prometheus' own ``up`` to 0, and nobody reads old values as new ones.

    Args:
        host: the address to listen on.
        port: the port; 0 takes a free one.
        fresh_s: how long a report is shown.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, *, fresh_s: float) -> None:
        self._fresh_s = fresh_s
        self._report: FleetReport | None = None
        self._since = 0.0
        outlet = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            #: A client that sends nothing is not waited for.
            timeout = 30

            def do_GET(self) -> None:
                status, kind, body = outlet.answer(self.path, self.headers.get("Accept", ""))
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not told one by one."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, name="raywb-fleet-scrape", daemon=True
        ).start()

    @property
    def address(self) -> str:
        """Where it listens, as ``host:port``."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"http://{self.address}/metrics"

    def publish(self, report: FleetReport, credentials: Credentials) -> None:
        """Show this report from now on."""
        self._report, self._since = report, time.monotonic()

    def close(self) -> None:
        """Stop to listen."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a request."""
        from prometheus_client.exposition import choose_encoder

        plain = "text/plain; charset=utf-8"
        if path.partition("?")[0] != "/metrics":
            return 404, plain, b"There is /metrics here, and nothing else.\n"
        report, since = self._report, self._since
        if report is None:
            return 503, plain, b"Nothing has been collected yet.\n"
        if time.monotonic() - since > self._fresh_s:
            return 503, plain, f"The last collection is of {report.window.end}.\n".encode()
        encode, kind = choose_encoder(accept)
        return 200, kind, encode(registry_of(report))
