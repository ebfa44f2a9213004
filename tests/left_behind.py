"""A service and a process that logs to it, without Ray, both killed in the middle of their work.

with LeftBehind(tmp_path) as left:
    left.begin(project="demo")      # both processes are at work
    logged = left.kill()            # rows whose log() had returned
    answer = left.raywb("recover")  # the command, on the service's directory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import wandb_client

_SERVICE = """
import json, sys, threading
from pathlib import Path
import msgspec
from local_service import LocalService

service = LocalService(Path(sys.argv[1]))
settings = json.loads(sys.argv[2])
service.up()
service.start(**settings)
print(msgspec.json.encode(service.endpoint).decode(), flush=True)
for line in sys.stdin:  # a number: finish within so many seconds
    print(msgspec.json.encode(service.service.finish(float(line), 0)).decode(), flush=True)
"""

_LOGGER = """
import os, sys, time
import msgspec
from local_service import CLUSTER
from raywb.client import Client
from raywb.connection import Connection
from raywb.reports import RunInfo
from raywb.shipping import Endpoint

endpoint = msgspec.json.decode(sys.argv[1], type=Endpoint)
connection = Connection(CLUSTER, endpoint, 1)
channel = connection.open_channel("s", None, None)
client = Client(connection, channel, "s", RunInfo(project="", id="", name="", mode="", dir=""))
client.config.update({"lr": 0.5})
client.define_metric("x", summary="max")
first, rows = int(sys.argv[2]), int(sys.argv[3])
number = first
while number < first + rows or rows < 0:
    client.log({"x": number}, step=number)
    os.write(1, b".")
    number += 1
    time.sleep(0.0005)
assert client.flush(30)
os.write(1, b"!")
sys.stdin.read()
"""


class LeftBehind:
    """Both processes, what they leave, and the command that looks at it."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "service"
        self.journals = root / "journals"
        self._root = root
        self._service: subprocess.Popen[bytes] | None = None
        self._logger: subprocess.Popen[bytes] | None = None
        self._output = root / "logged"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self._logger, self._service):
            if process is not None:
                process.kill()
                process.communicate()

    @property
    def environment(self) -> dict[str, str]:
        """No key, no server: what the test's settings or the command's options say counts."""
        paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
        known = wandb_client.client_environment(self._root)
        del known["WANDB_DIR"]
        return known | {
            "PYTHONPATH": os.pathsep.join(paths),
            "RAYWB_JOURNAL_DIR": str(self.journals),
            # W&B's client sends every 15 seconds, which is what a short test waits for.
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5",
        }

    def begin(self, *, first: int = 0, rows: int = -1, **settings: Any) -> None:
        """Start both; returns when the ledger has rows, or all ``rows`` are acknowledged."""
        self._service = self._start(_SERVICE, str(self.directory), json.dumps(settings))
        assert self._service.stdout is not None
        endpoint = self._service.stdout.readline().decode()
        with open(self._output, "wb") as output:
            self._logger = self._start(_LOGGER, endpoint, str(first), str(rows), stdout=output)
        deadline = time.monotonic() + 60
        ledger = self.directory / "ledger" / f"{0:020d}.log"
        enough = b"!" if rows >= 0 else b"." * 300
        while enough not in self._output.read_bytes() or (
            rows < 0 and ledger.stat().st_size < 10_000
        ):
            assert self._logger.poll() is None, "the logger ended"
            assert time.monotonic() < deadline, "the logger is not at work"
            time.sleep(0.02)

    def _start(self, script: str, *arguments: str, stdout: Any = subprocess.PIPE) -> Any:
        return subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=self.environment,
            cwd=self._root,
            stdin=subprocess.PIPE,
            stdout=stdout,
        )

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """``finish()`` in the service; returns its report."""
        assert self._service is not None
        assert self._service.stdin is not None
        assert self._service.stdout is not None
        self._service.stdin.write(f"{timeout_s}\n".encode())
        self._service.stdin.flush()
        report: dict[str, Any] = json.loads(self._service.stdout.readline())
        return report

    def kill(self) -> int:
        """SIGKILL to both; returns how many rows had been logged for sure."""
        for process in (self._service, self._logger):
            assert process is not None
            process.kill()
        for process in (self._service, self._logger):
            assert process is not None
            process.communicate()
        return self._output.read_bytes().count(b".")

    def raywb(
        self, command: str, *options: str, exit_code: int = 0, **environment: str
    ) -> dict[str, Any]:
        """Run the command on the directory; returns its JSON, or what it said where it failed."""
        done = subprocess.run(
            [sys.executable, "-m", "raywb", command, str(self.directory), *options, "--json"],
            env=self.environment | environment,
            cwd=self._root,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == exit_code, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"said": done.stderr}
        return answer
