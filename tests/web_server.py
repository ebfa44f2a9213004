"""A web server on loopback that hands out files in every way that real ones do."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file, and how the server behaves when it is asked for."""

    content: bytes
    #: Hands out parts; otherwise the whole file, whatever is asked.
    parts: bool = True
    #: Says how long the file is.
    length: bool = True
    etag: str | None = "one"
    #: Answers with this status instead.
    status: int | None = None
    #: Never answers.
    silent: bool = False
    #: Hangs up in the middle of so many answers.
    hang_ups: int = 0


@dataclass
class WebServer:
    """A running server; ``files`` may change at any time."""

    url: str
    files: dict[str, Served] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def put(self, name: str, content: bytes, **behaviour: object) -> str:
        """Serve a file under a name, and return its address."""
        self.files[name] = Served(content, **behaviour)
        return f"{self.url}/{name}"


class _Handler(BaseHTTPRequestHandler):
    web: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        self.web.requests[name] += 1
        served = self.web.files.get(name)
        if served is not None and served.silent:
            self.web.released.wait()
            self.close_connection = True
        elif served is None or served.status is not None:
            self.send_error(404 if served is None or served.status is None else served.status)
        else:
            self._send(served)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, served: Served) -> None:
        size = len(served.content)
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        begin, end = 0, size
        if asked and served.parts:
            first, _, last = asked.partition("-")
            begin, end = int(first), min(int(last) + 1 if last else size, size)
            if begin >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        else:
            self.send_response(200)
        if served.length:
            self.send_header("Content-Length", str(end - begin))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        if served.etag is not None:
            self.send_header("ETag", f'"{served.etag}"')
        self.end_headers()
        content = served.content[begin:end]
        if served.hang_ups and len(content) > 1:
            served.hang_ups -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        if self.command == "GET":
            self.web.sent_bytes += len(content)
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


@contextmanager
def web_server() -> Iterator[WebServer]:
    """Run a server; it ends with the block."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        handler.web = WebServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield handler.web
        finally:
            handler.web.released.set()
            server.shutdown()
            thread.join()
