"""The processes of a benchmark: a service, and processes that log."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from raywb.client import Client
from raywb.connection import Connection
from raywb.reports import RunInfo
from raywb.shipping import Endpoint
from tests.local_service import CLUSTER

_T = TypeVar("_T")

#: Longest that anything is waited for, in seconds.
PATIENCE_S = 300.0


class ServiceProcess:
    """A service in a process of its own."""

    def __init__(self, directory: Path, *, mode: str, looking: bool) -> None:
        command = [sys.executable, "-m", "tests.bench.service_process", str(directory), mode]
        self._process = subprocess.Popen(
            [*command, "looking" if looking else "quiet"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        where = self._read()
        self.endpoint = Endpoint(
            address=where["address"], token=where["token"], cluster_id=CLUSTER.cluster_id
        )

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the service's process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def figures(self) -> dict[str, Any]:
        """What it has done so far, and what it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def wait_for(
        self, condition: Callable[[dict[str, Any]], bool], *, every_s: float = 0.02
    ) -> dict[str, Any]:
        """Ask until its figures are as expected."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(found := self.figures()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the service did not come so far: {found}")
            time.sleep(every_s)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


@contextlib.contextmanager
def service_process(
    directory: Path, *, mode: str = "offline", looking: bool = False
) -> Iterator[ServiceProcess]:
    """A service that lives as long as the block; with ``looking`` it notes each delivery.

    Its clients have journals of their own: those that an earlier service left behind would be
    brought home to this one.
    """
    os.environ["RAYWB_JOURNAL_DIR"] = str(directory / "journals")
    service = ServiceProcess(directory / "service", mode=mode, looking=looking)
    try:
        if mode == "offline":
            service.wait_for(lambda found: bool(found["state"] == "running"))
        yield service
    finally:
        service.close()


def open_client(
    endpoint: Endpoint, stage: str | None, rank: int | None = None, world_size: int | None = None
) -> Client:
    """A client with a journal of its own, as another process of the cluster would have it."""
    connection = Connection(CLUSTER, endpoint, 1)
    channel = connection.open_channel(stage, rank, world_size)
    run = RunInfo(project="bench", id="bench001", name="bench", mode="offline", dir="")
    return Client(connection, channel, stage, run)


def close_client(client: Client) -> None:
    """End its thread."""
    client._connection.close(PATIENCE_S)


def flat_rows(count: int = 100) -> list[dict[str, float]]:
    """Rows of ten floats each."""
    return [{f"metric_{n}": random.random() for n in range(10)} for _ in range(count)]


def in_processes(count: int, function: Callable[..., _T], *arguments: Any) -> list[_T]:
    """Run a function in this many fresh processes at once, numbered from 0; its results."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        futures: list[Future[_T]] = [
            pool.submit(function, number, *arguments) for number in range(count)
        ]
        return [future.result() for future in futures]


def at(moment_s: float) -> None:
    """Wait for a moment on the wall clock, so that processes begin together."""
    time.sleep(max(moment_s - time.time(), 0.0))
