"""Online, whoever is killed or stopped: every row is at W&B's server once, in its source's order.

The service is a process of its own, which is killed for good and made again as Ray would. Several
clients log without a pause. What is killed when is drawn from a seed, which a failure shows;
``RAYWB_LONG=1`` makes many more rounds, and stops the service for a minute.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from child_processes import signal_all
from local_service import LocalService, local_service
from online_service import KEY, set_environment
from ray_cluster import until
from service_process import ServiceProcess
from wandb_file import MetricDefinition
from wandb_server import WandbServer

from raywb.client import Client
from raywb.reports import FinishReport

# Read here, since each test runs without such variables.
LONG = bool(os.environ.get("RAYWB_LONG"))
SEED = os.environ.get("RAYWB_SEED")

DEADLINE_S = 10.0
SINK, CORE = "raywb.service.wandb_sink", "wandb-core"


@pytest.fixture
def dice() -> random.Random:
    """Random numbers from a seed that a failing test shows; ``RAYWB_SEED`` repeats it."""
    seed = int(SEED or random.SystemRandom().randrange(2**32))
    print(f"RAYWB_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture
def service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: WandbServer
) -> Iterator[LocalService]:
    """A service process with an open run, and no clients yet."""
    key = tmp_path / "key"
    key.write_text(KEY)
    set_environment(monkeypatch, tmp_path)
    with local_service(tmp_path, ServiceProcess) as local:
        local.up()
        local.start(
            mode="online",
            base_url=server.url,
            api_key_file=str(key),
            project="p",
            sink_deadline_s=DEADLINE_S,
        )
        yield local


class Stream:
    """A client that logs without a pause, in a thread, until it is told to end."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.rows = 0
        self.slowest_s = 0.0
        self._going = True
        # A daemon: the stream of a test that fails ends with the process.
        self._thread = threading.Thread(target=self._log, daemon=True)
        self._thread.start()

    def _log(self) -> None:
        while self._going:
            began = time.perf_counter()
            self.client.log({"i": self.rows, "peak": -self.rows}, step=self.rows)
            self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
            self.rows += 1
            time.sleep(0.005)

    def end(self) -> None:
        self._going = False
        self._thread.join()
        assert self.client.flush(30.0)


class Streams:
    """Three streams, and what they must have become at the server."""

    def __init__(self, service: LocalService, server: WandbServer) -> None:
        self.service = service
        self.server = server
        clients = {f"s{number}": service.client(f"s{number}") for number in range(3)}
        first = clients["s0"]
        first.config.update({"lr": 0.1, "model": {"layers": 2}})
        first.define_metric("peak", summary="max")
        first.summary["best"] = 7
        self.streams = {stage: Stream(client) for stage, client in clients.items()}

    def wait_for_rows(self) -> None:
        """Wait until rows arrive at the server that were not there when this began."""
        before = self.row_count
        self.server.wait_until(lambda: self.row_count > before, timeout_s=60.0)

    @property
    def row_count(self) -> int:
        return sum(run.row_count for run in self.server.runs.values())

    def end(self) -> None:
        """End the streams, and wait until the server has shown all rows, without a finish()."""
        for stream in self.streams.values():
            stream.end()
        rows = self.total
        self.service.wait_for(lambda status: status.sink.confirmed_rows == rows, 90.0)

    @property
    def total(self) -> int:
        return sum(stream.rows for stream in self.streams.values())

    def finish(self) -> FinishReport:
        """Finish, and check the report and the run."""
        report: FinishReport = self.service.service.finish(90.0, 0)
        self.check(report)
        return report

    def check(self, report: FinishReport) -> None:
        slowest_s = max(stream.slowest_s for stream in self.streams.values())
        sink = self.service.status().sink
        print(f"{self.total} rows, slowest log() {slowest_s * 1e3:.1f} ms, {sink}")
        assert (report.complete, report.delivered_rows) == (True, self.total), report
        assert (report.received_rows, report.lost) == (self.total, {})
        (run,) = self.server.runs.values()
        for stage, stream in self.streams.items():
            assert run.values(f"{stage}/i") == list(range(stream.rows)), stage
        assert run.steps == list(range(self.total))
        assert (run.run_id, run.group, run.overwritten) == ("run00001", "group", 0)
        assert run.state == "finished"
        assert run.config == {"lr": 0.1, "model": {"layers": 2}}
        assert run.metrics["s0/peak"] == MetricDefinition("s0/step", frozenset({"max"}))
        assert run.summary["s0/peak"] == {"max": 0}
        assert run.summary["s0/best"] == 7
        assert slowest_s < 1.0, "log() waited for somebody"


@pytest.mark.timeout(1800 if LONG else 180)
def test_the_service_is_killed(
    service: LocalService, server: WandbServer, dice: random.Random
) -> None:
    """Each incarnation resumes the same run behind the server's last row; also in a finish()."""
    streams = Streams(service, server)
    streams.wait_for_rows()
    for number in range(25 if LONG else 4):
        time.sleep(dice.uniform(0.0, 3.0))
        service.service.kill()
        service.service.close()
        service.up()
        if number % 2:
            streams.wait_for_rows()
    for stream in streams.streams.values():
        stream.end()
    ended = threading.Thread(target=_finish_that_is_killed, args=[service], daemon=True)
    ended.start()
    time.sleep(dice.uniform(0.0, 2.0))
    service.service.kill()
    ended.join()
    service.service.close()
    service.up()
    streams.finish()
    assert service.status().incarnation == (27 if LONG else 6)


def _finish_that_is_killed(service: LocalService) -> None:
    # It may be faster than the signal, and return.
    with contextlib.suppress(EOFError):
        service.service.finish(90.0, 0)


def send(service: LocalService, name: str, number: signal.Signals) -> None:
    """Send a signal to each process of that name, and wait until somebody has ended it."""
    victims = until(name, lambda: service.service.children(name))
    signal_all(victims, number)
    until(f"the end of {name}", lambda: not any(process.is_running() for process in victims))


@pytest.mark.timeout(1800 if LONG else 180)
def test_the_writer_to_wandb_is_killed_or_stopped(
    service: LocalService, server: WandbServer, dice: random.Random
) -> None:
    """The sink's process or wandb-core dies or hangs: it is replaced, without a finish()."""
    streams = Streams(service, server)
    for _ in range(6 if LONG else 1):
        for name, number in [
            (SINK, signal.SIGKILL),
            (CORE, signal.SIGKILL),
            (CORE, signal.SIGSTOP),
        ]:
            streams.wait_for_rows()
            time.sleep(dice.uniform(0.0, 1.0))
            send(service, name, number)
    streams.wait_for_rows()
    streams.end()
    assert service.status().sink.restarts >= 3
    streams.finish()


@pytest.mark.timeout(300)
def test_the_service_is_stopped_and_goes_on(service: LocalService, server: WandbServer) -> None:
    """A service that stands still for a while holds up nobody, and goes on where it stood."""
    streams = Streams(service, server)
    streams.wait_for_rows()
    service.service.process.suspend()
    before = streams.total
    time.sleep(60.0 if LONG else 3.0)
    assert streams.total > before + 100, "log() stood still with the service"
    service.service.process.resume()
    streams.wait_for_rows()
    streams.end()
    assert service.status().incarnation == 1
    streams.finish()
