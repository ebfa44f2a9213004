"""A Google Cloud Storage on loopback: as much of its JSON API as reading objects takes.

Source of the protocol: https://cloud.google.com/storage/docs/json_api/v1/objects
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class GcsServer:
    """A running server; ``objects`` are the content of its one bucket, called ``bucket``."""

    url: str
    objects: dict[str, bytes] = field(default_factory=dict)
    #: Nobody may read anything, and gets this status.
    refusal: int | None = None

    def facts(self, name: str) -> dict[str, Any]:
        """Return an object's metadata."""
        content = self.objects[name]
        digest = hashlib.md5(content).hexdigest()
        return {
            "kind": "storage#object",
            "id": f"bucket/{name}/1",
            "bucket": "bucket",
            "name": name,
            "size": str(len(content)),
            "generation": str(int(digest[:12], 16)),
            "etag": digest,
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def listing(self, prefix: str, delimiter: str) -> dict[str, Any]:
        """Return the objects below a prefix, and what the delimiter holds together."""
        items, prefixes = [], set()
        for name in sorted(name for name in self.objects if name.startswith(prefix)):
            inner, found, _ = name.removeprefix(prefix).partition(delimiter or "\0")
            if delimiter and found:
                prefixes.add(f"{prefix}{inner}{delimiter}")
            else:
                items.append(self.facts(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(BaseHTTPRequestHandler):
    gcs: GcsServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        words = {name: values[0] for name, values in parse_qs(address.query).items()}
        path = address.path.removeprefix("/download").removeprefix("/storage/v1/b/")
        bucket, _, rest = path.partition("/")
        name = unquote(rest.removeprefix("o").removeprefix("/"))
        if self.gcs.refusal is not None:
            error = {"code": self.gcs.refusal, "message": "no access to it"}
            self._answer(self.gcs.refusal, {"error": error})
        elif bucket != "bucket" or (name and name not in self.gcs.objects):
            self._answer(404, {"error": {"code": 404, "message": "Not Found"}})
        elif words.get("alt") == "media":
            self._media(self.gcs.objects[name])
        elif name:
            self._answer(200, self.gcs.facts(name))
        else:
            self._answer(200, self.gcs.listing(words.get("prefix", ""), words.get("delimiter", "")))

    def _media(self, content: bytes) -> None:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """Run a server; it ends with the block."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.gcs = GcsServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield handler.gcs
        finally:
            server.shutdown()
            thread.join()
