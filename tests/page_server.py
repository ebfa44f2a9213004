"""A page's server as somebody with a socket sees it, and one in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Server:
    """A page's server, as somebody with a socket sees it."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.host = host
        self.port = port

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def get(self, path: str, status: int = 200, **headers: str) -> Any:
        got, answer_headers, body = self.ask(path, **headers)
        assert got == status, (got, body)
        assert answer_headers["Content-Type"].startswith("application/json")
        assert answer_headers["Cache-Control"] == "no-store"
        return json.loads(body)

    def wait_for(self, path: str, condition: Any, timeout_s: float = 20.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while not condition(answer := self.get(path)):
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)
        return answer

    @contextlib.contextmanager
    def events(self) -> Iterator[Iterator[Any]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/api/events")
            answer = connection.getresponse()
            assert answer.headers["Content-Type"].startswith("text/event-stream")

            def overviews() -> Iterator[Any]:
                while line := answer.readline():
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])

            yield overviews()


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[tuple[Server, str]]:
    """A process that serves a page, and what it said; ends well when it is interrupted."""
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            said = ""
            while "Ctrl-C" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            url = next(word for word in said.split() if word.startswith("http://"))
            yield Server(int(url.split(":")[2].split("/")[0])), said
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
