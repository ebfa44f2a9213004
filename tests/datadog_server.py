"""A loopback server that takes metrics as Datadog's v2 API does, and checks each payload.

It answers what the real one answers: 202 with `{"errors": []}`, 400 for what its schema does not
allow, 403 for a key that it does not know, 413 for too much at once; and misbehaves when told to.
"""

from __future__ import annotations

import json
import math
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import LoopbackServer

#: Most bytes in one payload.
MOST_BYTES = 512_000

#: A point may lie so far in the past, and in the future, in seconds.
PAST_S, FUTURE_S = 3600, 600

GAUGE = 3


class DatadogServer(LoopbackServer):
    """The server, in threads of its own."""

    def __init__(self, api_key: str) -> None:
        super().__init__()
        self.api_key = api_key
        #: Series as they were accepted, in their batches.
        self.batches: list[list[dict[str, Any]]] = []
        #: How many requests came.
        self.requests = 0
        #: Answers for the next requests: a status, and headers.
        self.answers: list[tuple[int, dict[str, str]]] = []
        #: Answer byte by byte, and never to the end.
        self.trickles = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, headers = outer._take(self.path, self.headers.get("DD-API-KEY"), body)
                text = json.dumps({"errors": [] if status == 202 else [f"said {status}"]}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                for index in range(len(text)):
                    self.wfile.write(text[index : index + 1])
                    if outer.trickles and outer._ended.wait(1.0):
                        return

            def log_message(self, *_: object) -> None:
                pass

        self._listen(Handler)

    @property
    def series(self) -> dict[str, dict[str, Any]]:
        """Accepted series by metric."""
        return {one["metric"]: one for batch in self.batches for one in batch}

    def _take(self, path: str, key: str | None, body: bytes) -> tuple[int, dict[str, str]]:
        self.requests += 1
        if self.answers:
            return self.answers.pop(0)
        if path != "/api/v2/series":
            return 404, {}
        if key != self.api_key:
            return 403, {}
        if len(body) > MOST_BYTES:
            return 413, {}
        payload = json.loads(body)
        if set(payload) != {"series"} or not all(map(_allowed, payload["series"])):
            return 400, {}
        self.batches.append(payload["series"])
        return 202, {}


def _allowed(one: dict[str, Any]) -> bool:
    """Whether a series is what the schema allows, and a gauge with points of today."""
    if not {"metric", "points"} <= set(one) <= {"metric", "points", "type", "tags", "unit"}:
        return False
    now = time.time()
    return (
        isinstance(one["metric"], str)
        and one.get("type") == GAUGE
        and all(isinstance(tag, str) and ":" in tag for tag in one.get("tags", []))
        and bool(one["points"])
        and all(
            set(point) == {"timestamp", "value"}
            and isinstance(point["timestamp"], int)
            and now - PAST_S <= point["timestamp"] <= now + FUTURE_S
            and isinstance(point["value"], int | float)
            and math.isfinite(point["value"])
            for point in one["points"]
        )
    )
