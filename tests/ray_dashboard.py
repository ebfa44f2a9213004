"""A loopback server that answers like the job API of Ray's dashboard, and misbehaves as told.

    with RayDashboard() as dashboard:
        dashboard.faults += ["hang", 500]     # one for each request to come, then well again
        dashboard.job = {"status": "RUNNING"}

A job that is submitted runs, as a process of its own, to its end. Faults: a status, ``hang`` (no
answer), ``reset`` (the connection is closed), ``nonsense`` (200, and no JSON).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import LoopbackServer

__all__ = ["RayDashboard"]


class RayDashboard(LoopbackServer):
    """The server; what it says may be changed at any time."""

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        #: The environment in which Ray was started.
        self.environment: Callable[[], Mapping[str, str]] = lambda: os.environ
        #: What Ray has of the job; None where it has none.
        self.job: dict[str, Any] | None = None
        #: How the next requests go wrong, one each.
        self.faults: list[int | str] = []
        #: How the next submissions go wrong.
        self.refusals: list[int] = []
        #: Faults that begin when a job was taken.
        self.after_submission: list[int | str] = []
        #: Whether it is there at all.
        self.up: Callable[[], bool] = lambda: True
        #: Requests so far, as in "GET /api/version".
        self.requests: list[str] = []
        self._listen(_handler(self), port)

    def answer(self, request: str, body: Any) -> tuple[int, Any]:
        if request == "GET /api/version":
            return 200, {"version": "4", "ray_version": "2.60.0"}
        if request == "POST /api/jobs/":
            return self._submit(body)
        if self.job is None:
            return 404, "Job job-1 does not exist"
        if request.startswith("POST"):
            self.job = {"status": "STOPPED"}
            return 200, {"stopped": True}
        return 200, self.job

    def _submit(self, asked: dict[str, str]) -> tuple[int, Any]:
        if self.refusals:
            return self.refusals.pop(0), "Traceback: no agent"
        done = subprocess.run(asked["entrypoint"], shell=True, check=False, env=self.environment())
        self.faults += self.after_submission
        status = "FAILED" if done.returncode else "SUCCEEDED"
        self.job = {"status": status, "driver_exit_code": done.returncode}
        return 200, {"submission_id": asked["submission_id"]}


def _handler(dashboard: RayDashboard) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _handle(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = f"{self.command} {self.path}"
            dashboard.requests.append(request)
            if not dashboard.up():
                return
            fault = dashboard.faults.pop(0) if dashboard.faults else None
            if fault in ("hang", "reset"):
                if fault == "hang":
                    dashboard._ended.wait()
                return
            status, answer = 200, "<html>"
            if isinstance(fault, int):
                status, answer = fault, "Traceback: GCS deadline exceeded"
            elif fault is None:
                status, answer = dashboard.answer(request, json.loads(text) if text else None)
            sent = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = _handle

    return Handler
