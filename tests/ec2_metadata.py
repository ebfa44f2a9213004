"""A loopback server that answers like EC2's instance metadata, version 2, and takes no other.

with Ec2Metadata() as metadata:
    ...                                   # asks metadata.url
    metadata.announce("terminate", 120)   # from now on the notice is there
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import LoopbackServer

__all__ = ["Ec2Metadata"]


class Ec2Metadata(LoopbackServer):
    """The server, in a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: set[str] = set()
        self.notice: dict[str, str] | None = None
        #: Answers by method, path and status.
        self.answers: Counter[tuple[str, str, int]] = Counter()
        self._listen(_handler(self))

    def announce(self, action: str, in_s: float) -> None:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + in_s))
        self.notice = {"action": action, "time": at}


def _handler(metadata: Ec2Metadata) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if self.path != "/latest/api/token":
                self._answer(404)
            elif not seconds.isdigit() or not 1 <= int(seconds) <= 21_600:
                self._answer(400)
            else:
                token = secrets.token_urlsafe(40)
                metadata.tokens.add(token)
                self._answer(200, token)

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") not in metadata.tokens:
                self._answer(401)
            elif self.path != "/latest/meta-data/spot/instance-action" or not metadata.notice:
                self._answer(404, "<html>404 - Not Found</html>")
            else:
                text = ", ".join(f'"{key}": "{one}"' for key, one in metadata.notice.items())
                self._answer(200, "{" + text + "}")

        def _answer(self, status: int, text: str = "") -> None:
            metadata.answers[self.command, self.path, status] += 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
