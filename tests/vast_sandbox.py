"""The inside of an instance: a directory in which an on-start script runs as Vast.ai runs it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from ray_cluster import clean_environment, until
from vast_server import VastInstance, VastServer

__all__ = ["Sandbox", "sandbox"]


class Sandbox:
    """One instance's disk; all processes that were started in it know it by a variable."""

    def __init__(self, root: Path, vast: VastServer, instance: VastInstance) -> None:
        self.root = root
        self.instance = instance
        self.state = root / "launch"
        home = root / "home"
        home.mkdir()
        (root / "console").touch()
        ports = [str(_free_port()) for _ in range(3)]
        options = [
            *(f"--temp-dir={root / 'ray'}", "--num-cpus=8"),
            *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
            *("--object-store-memory=100000000", f"--ray-client-server-port={ports[1]}"),
        ]
        clean = clean_environment(home)
        del clean["PYTHONPATH"]  # what runs is the commit that the script fetches
        self.environment = {
            **clean,
            **instance.environment,
            **{"VAST_URL": vast.url, "RAYWB_LAUNCH_DIR": str(self.state)},
            **{"RAYWB_VENV": sys.prefix, "RAYWB_CONSOLE": str(root / "console")},
            **{"RAYWB_DASHBOARD_PORT": ports[0], "RAYWB_RAY_OPTIONS": " ".join(options)},
            **{"RAYWB_RAY_PORT": ports[2], "RAYWB_PAUSES_S": "0"},
        }

    def start(self, more: Mapping[str, str] | None = None) -> psutil.Popen:
        """Start the container: its on-start script begins."""
        with open(self.root / "output", "ab") as output:
            return psutil.Popen(
                ["bash", "-c", self.instance.body["onstart"]],
                cwd=self.root,
                env={**self.environment, **(more or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, more: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> int:
        """Start it, and wait for the script's end; returns its exit code."""
        return int(self.start(more).wait(timeout_s))

    @property
    def log(self) -> str:
        """What the script said so far, as ``vastai logs`` would show it."""
        return (self.root / "console").read_text(errors="replace")

    def logged(self, text: str, timeout_s: float = 120.0) -> None:
        """Wait until the log has a text."""
        until(f"{text!r} in the log", lambda: text in self.log, timeout_s)

    def processes(self) -> list[psutil.Process]:
        """All that runs in it, however far it has gone from the script."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAYWB_LAUNCH_DIR") == str(self.state):
                    found.append(process)
        return found

    def cut_power(self) -> None:
        """End all of it at once, as when the container is stopped."""
        while alive := self.processes():
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=10)

    def is_shown(self, secret: str) -> bool:
        """Whether any process of it has a text in its command line."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if any(secret in word for word in process.cmdline()):
                    return True
        return False


@contextlib.contextmanager
def sandbox(vast: VastServer, instance: VastInstance) -> Iterator[Sandbox]:
    """An instance's inside; nothing of it outlives the block."""
    # Ray's socket paths have 107 characters at most, so pytest's directories are too deep.
    root = Path(tempfile.mkdtemp(prefix="rv", dir="/tmp"))
    inside = Sandbox(root, vast, instance)
    try:
        yield inside
    except BaseException:
        print(inside.log[-6000:])
        raise
    finally:
        inside.cut_power()
        shutil.rmtree(root, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
