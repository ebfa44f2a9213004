"""What every server that stands in for a foreign one shares: a port on loopback, and an end."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

__all__ = ["LoopbackServer"]


class LoopbackServer:
    """A server in a thread of its own, for as long as the block.

    Attributes:
        _ended: set at its end; whoever hangs on purpose waits for it.
    """

    _server: ThreadingHTTPServer
    _thread: threading.Thread

    def __init__(self) -> None:
        self._ended = threading.Event()

    def _listen(self, handler: type[BaseHTTPRequestHandler], port: int = 0) -> None:
        """Take a port, any by default; requests are answered from the block's beginning."""
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, once."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
