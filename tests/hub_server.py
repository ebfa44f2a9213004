"""A Hugging Face hub on loopback: as much of its HTTP interface as reading datasets takes.

What is asked of it is what the real ``huggingface_hub`` asks; the answers follow
https://huggingface.co/docs/hub/api and the error codes in the header ``X-Error-Code``.
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

TOKEN = "hf_of_the_tests"


@dataclass
class Dataset:
    """A dataset's commits, and which of them its branches stand at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    #: May be read with a token alone.
    private: bool = False
    #: May be listed by everybody, but read by nobody who has not accepted its terms.
    gated: bool = False

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put a branch at a new commit of these files, and return it."""
        commit = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class HubServer:
    """A running hub."""

    url: str
    datasets: dict[str, Dataset] = field(default_factory=dict)


def _entry(path: str, content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path, "oid": blob, "size": len(content)}


class _Refused(Exception):
    """The request is answered with an error."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._body = self.rfile.read(length)
        try:
            self._route(urlsplit(self.path).path.strip("/").split("/"))
        except _Refused as refused:
            self._answer(refused.status, {"error": refused.code}, {"X-Error-Code": refused.code})

    do_POST = do_HEAD = do_GET

    def _route(self, parts: list[str]) -> None:
        if parts[:2] == ["api", "datasets"]:
            parts = [*map(unquote, parts[2:]), "", ""]
            name, verb = "/".join(parts[:2]), parts[2]
            dataset = self._dataset(name)
            commit, files = self._files(dataset, parts[3] if verb else "main")
            path = "/".join(part for part in parts[4:] if part)
            if verb in ("", "revision"):
                self._answer(200, {"id": name, "sha": commit, "siblings": []})
            elif verb == "tree":
                self._answer(200, self._tree(files, path))
            elif verb == "paths-info":
                self._answer(200, self._paths_info(files))
            else:
                raise _Refused(404, "NoSuchRoute")
        elif parts[0] == "datasets" and parts[3] == "resolve":
            dataset = self._dataset("/".join(map(unquote, parts[1:3])))
            if dataset.gated:
                raise _Refused(403, "GatedRepo")
            _, files = self._files(dataset, unquote(parts[4]))
            self._resolve(files, unquote("/".join(parts[5:])))
        else:
            raise _Refused(404, "NoSuchRoute")

    def _dataset(self, name: str) -> Dataset:
        dataset = self.hub.datasets.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if dataset is None or (dataset.private and not allowed):
            raise _Refused(404 if allowed else 401, "RepoNotFound")
        return dataset

    def _files(self, dataset: Dataset, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = dataset.branches.get(revision, revision)
        if commit not in dataset.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit, dataset.commits[commit]

    def _tree(self, files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
        words = parse_qs(urlsplit(self.path).query)
        recursive = words.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        below = {path: content for path, content in files.items() if path.startswith(prefix)}
        if not below:
            raise _Refused(404, "EntryNotFound")
        folders = {prefix + path.removeprefix(prefix).partition("/")[0] for path in below}
        entries = [_entry(path, None) for path in sorted(folders - below.keys())]
        entries += [
            _entry(path, content)
            for path, content in below.items()
            if recursive or "/" not in path.removeprefix(prefix)
        ]
        return entries

    def _paths_info(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        raw = self._body.decode()
        asked = json.loads(raw) if raw.startswith("{") else parse_qs(raw)
        paths = asked["paths"]
        found = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in files:
                found.append(_entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append(_entry(path, None))
        return found

    def _resolve(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            raise _Refused(404, "EntryNotFound")
        content = files[path]
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        first, _, last = asked.partition("-")
        part = content[int(first) : int(last) + 1 if last else None] if asked else content
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{_entry(path, content)["oid"]}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a hub; it ends with the block."""
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        handler.hub = HubServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield handler.hub
        finally:
            server.shutdown()
            thread.join()
