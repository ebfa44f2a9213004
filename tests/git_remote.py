"""A repository and its remote, which git's own daemon serves on loopback.

with git_remote(tmp_path) as remote:
    remote.write("recipe.py", "print()")
    commit = remote.commit()
    remote.push()
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ray_cluster import until

__all__ = ["GitRemote", "git_remote", "private_address"]


@dataclass
class GitRemote:
    """A working tree whose ``origin`` is at ``url``."""

    tree: Path
    url: str
    #: The bare repository that is served.
    bare: Path

    def git(self, *words: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", *words],
            cwd=self.tree,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def write(self, name: str, text: str) -> None:
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def copy(self, source: Path) -> None:
        """Take a file, or a folder without what Python made there."""
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, self.tree / source.name, ignore=ignored)
        else:
            shutil.copy(source, self.tree)

    def commit(self) -> str:
        """Commit all there is; returns the commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", "as it is")
        return self.git("rev-parse", "HEAD")

    def push(self) -> None:
        self.git("push", "--quiet", str(self.bare), "HEAD:refs/heads/main")


@contextlib.contextmanager
def git_remote(root: Path) -> Iterator[GitRemote]:
    """Serve a new repository; its remote has one commit at first."""
    served, tree = root / "served", root / "tree"
    bare = served / "robots.git"
    bare.mkdir(parents=True)
    tree.mkdir()
    for words in (["init", "-q", "--bare", str(bare)], ["init", "-q", "-b", "main", str(tree)]):
        subprocess.run(["git", *words], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--export-all", "--reuseaddr", f"--base-path={served}", f"--port={port}"]
    daemon = subprocess.Popen(
        [f"{_exec_path()}/git-daemon", "--listen=127.0.0.1", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": str(root)},
    )
    try:
        until("git's daemon to listen", lambda: _listens(port))
        remote = GitRemote(tree, f"git://127.0.0.1:{port}/robots.git", bare)
        remote.git("remote", "add", "origin", remote.url)
        remote.write("README", "robots\n")
        remote.commit()
        remote.push()
        yield remote
    finally:
        daemon.terminate()
        daemon.wait(10)


@contextlib.contextmanager
def private_address(remote: GitRemote, token: str) -> Iterator[str]:
    """Serve the remote over HTTP, too, by git's own program, to whoever has a token."""
    wanted = "Basic " + base64.b64encode(f"x-access-token:{token}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != wanted:
                self.send_response(401)
                self.send_header("WWW-Authenticate", "Basic realm=git")
                self.end_headers()
                return
            path, _, query = self.path.partition("?")
            done = subprocess.run(
                [f"{_exec_path()}/git-http-backend"],
                input=body,
                capture_output=True,
                check=True,
                env={
                    **{"PATH": os.environ["PATH"], "REQUEST_METHOD": self.command},
                    **{"GIT_PROJECT_ROOT": str(remote.bare.parent), "GIT_HTTP_EXPORT_ALL": "1"},
                    **{"PATH_INFO": path, "QUERY_STRING": query},
                    "CONTENT_TYPE": self.headers.get("Content-Type") or "",
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding") or "",
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol") or "",
                },
            )
            head, _, answer = done.stdout.partition(b"\r\n\r\n")
            fields = [line.partition(": ") for line in head.decode().split("\r\n")]
            status = next((value for name, _, value in fields if name == "Status"), "200")
            self.send_response(int(status.split()[0]))
            for name, _, value in fields:
                if name != "Status":
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = _handle

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{remote.bare.name}"
        finally:
            server.shutdown()
            thread.join()


def _exec_path() -> str:
    done = subprocess.run(["git", "--exec-path"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False
