"""W&B's server refuses, fails or hangs: nobody waits for it, and every row is there in the end.

The real client and the service in this process, against the loopback server. What *delivered*
means is asked of the server, at intervals, and not only when the run is finished.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from local_service import LocalService, local_service
from online_service import KEY, Rows, check_run, confirm, set_environment
from ray_cluster import until
from wandb_client import run_client
from wandb_server import WandbServer

from raywb.reports import FinishReport
from raywb.service import sink_process
from raywb.service.confirm import PATIENT_INTERVALS, Standstill

# Read here, since each test runs without such variables.
LONG = bool(os.environ.get("RAYWB_LONG"))

#: How long W&B's side may take for one step here; nobody but the sink may wait for so long.
DEADLINE_S = 5.0


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    set_environment(monkeypatch, tmp_path)
    with local_service(tmp_path) as local:
        yield local


def start_online(service: LocalService, server: WandbServer, **settings: Any) -> None:
    """Open a run that has a key; W&B's side is not waited for."""
    settings = {"sink_deadline_s": DEADLINE_S, **settings}
    began = time.monotonic()
    service.start(mode="online", base_url=server.url, project="p", api_key=KEY, **settings)
    assert time.monotonic() - began < DEADLINE_S / 3, "start() waited for W&B"


class Fault(NamedTuple):
    """What the server does, and how it stops."""

    begin: Callable[[WandbServer], None]
    end: Callable[[WandbServer], None] = WandbServer.behave


FAULTS = {
    **{
        str(status): Fault(lambda server, status=status: server.misbehave(status=status))
        for status in (401, 403, 429, 500)
    },
    "refuses": Fault(WandbServer.refuse, WandbServer.listen_again),
    "hangs": Fault(WandbServer.hang),
}


def meet(fault: Fault, server: WandbServer) -> int:
    """Begin a fault, and return how many requests had met one before."""
    met = sum(server.disturbed.values())
    fault.begin(server)
    return met


def wait_until_met(server: WandbServer, before: int) -> None:
    """Wait until a request has met the fault; nobody can count those that are refused."""
    if server.listens:
        until("a request that meets the fault", lambda: sum(server.disturbed.values()) > before)
    else:
        time.sleep(2.0)


@pytest.mark.parametrize("name", FAULTS)
def test_at_start_in_the_middle_and_at_finish(service: LocalService, name: str) -> None:
    """The backlog waits on disk, log() and start() wait for nothing, and delivery resumes."""
    fault = FAULTS[name]
    with WandbServer() as server:
        service.up()
        fault.begin(server)
        start_online(service, server)
        rows = Rows(service.client("s"))
        rows.log(100)
        status = service.wait_for(lambda status: status.sink.restarts > 0)
        assert (status.outbox_rows, status.backlog_rows, status.sink.confirmed_rows) == (
            100,
            100,
            0,
        )
        fault.end(server)
        confirm(service, 100)

        met = meet(fault, server)
        rows.log(100)
        wait_until_met(server, met)
        rows.log(100)
        assert service.status().backlog_rows > 0
        fault.end(server)
        confirm(service, 300)

        reports: list[FinishReport] = []
        finish = threading.Thread(
            target=lambda: reports.append(service.service.finish(90.0, 0)), daemon=True
        )
        rows.log(100)
        met = meet(fault, server)
        finish.start()
        wait_until_met(server, met)
        fault.end(server)
        finish.join()
        assert (reports[0].complete, reports[0].delivered_rows) == (True, 400), reports
        check_run(server, 400)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["403", "401", "hangs"] if LONG else ["403", "hangs"])
def test_a_file_stream_that_is_refused_for_a_while(service: LocalService, name: str) -> None:
    """What W&B's client loses without a word is sent again, long before anybody calls finish().

    The rest of the server answers, so nothing but its step tells that rows do not arrive.
    """
    refused_s = 25.0 if LONG else 6.0
    with WandbServer() as server:
        service.up()
        start_online(service, server)
        rows = Rows(service.client("s"))
        rows.log(10)
        confirm(service, 10)
        if name == "hangs":
            server.hang("file_stream")
        else:
            server.misbehave("file_stream", status=int(name))
        ends_at = time.monotonic() + refused_s
        while time.monotonic() < ends_at:
            rows.log(5)
            time.sleep(0.1)
        server.behave()
        confirm(service, rows.count)
        assert service.status().sink.restarts > 0
        rows.log(5)
        report = service.service.finish(60.0, 1)
        assert (report.complete, report.delivered_rows) == (True, rows.count), report
        check_run(server, rows.count, state="failed")


@pytest.mark.parametrize("kind", ["file_stream", "graphql"])
def test_the_end_of_the_run_is_refused(service: LocalService, kind: str) -> None:
    """All rows are there, but neither the run's end nor its last config: both are sent again."""
    with WandbServer() as server:
        service.up()
        start_online(service, server)
        client = service.client("s")
        rows = Rows(client)
        rows.log(10)
        confirm(service, 10)
        client.config.update({"late": 1})
        client.summary["best"] = 7
        server.misbehave(kind, status=403, times=1)
        assert client.flush()
        service.wait_for(lambda status: status.received_rows == 10)
        report = service.service.finish(90.0, 0)
        assert report.complete, report
        (run,) = server.runs.values()
        assert (run.state, run.config["late"], run.summary["s/best"]) == ("finished", 1, 7)
        assert run.steps[:10] == list(range(10))


def test_a_standstill_is_told_from_a_slow_server() -> None:
    """Rows that move, a server that does not answer and one that has all are no standstill."""
    standstill = Standstill()
    standstill.begin(0, interval_s=1.0)
    patience_s = standstill.patience_s
    assert patience_s == PATIENT_INTERVALS
    # Nothing handed over; then one row more with each answer, however late.
    assert not standstill.note(0, 0, answers=1, now=0.0)
    for answers in range(2, 10):
        assert not standstill.note(answers, 100, answers, now=100.0 * answers)
    # The same answer, seen again and again: the server has said nothing since.
    assert not standstill.note(9, 100, answers=9, now=1e6)
    # From the first answer that shows nothing new, it is given its time.
    assert not standstill.note(9, 100, answers=10, now=2e6)
    assert not standstill.note(9, 100, answers=11, now=2e6 + patience_s)
    assert standstill.note(9, 100, answers=12, now=2e6 + patience_s + 1.0)
    # Replaced in vain: the next one is given twice the time, until a row has come.
    for times in (2, 4, 4):
        standstill.begin(9, interval_s=1.0)
        assert standstill.patience_s == times * patience_s
        standstill.note(9, 100, answers=1, now=0.0)
        assert standstill.note(9, 100, answers=2, now=1e6)
    standstill.begin(10, interval_s=1.0)
    assert standstill.patience_s == patience_s


def test_the_client_of_wandb_is_given_so_much_and_no_more(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server shows nothing, what is not handed over stays on disk and nowhere else."""
    monkeypatch.setattr(sink_process, "MOST_UNCONFIRMED_ROWS", 300)
    with WandbServer() as server:
        service.up()
        start_online(service, server)
        rows = Rows(service.client("s"))
        rows.log(100)
        confirm(service, 100)
        met = meet(FAULTS["hangs"], server)
        for _ in range(20):
            rows.log(100)
        wait_until_met(server, met)
        service.wait_for(lambda status: status.outbox_rows == 2100)
        service.wait_for(lambda status: status.sink.applied_rows >= 400)
        time.sleep(1.5)  # in which a sink without a bound would hand over all of them
        status = service.status()
        # One request may reach beyond the bound, and the outbox gives whole batches.
        assert status.sink.applied_rows < 400 + sink_process.ROWS_PER_REQUEST + 100
        assert status.backlog_rows == 2000
        server.behave()
        confirm(service, 2100)


def test_somebody_else_writes_to_the_run(service: LocalService, tmp_path: Path) -> None:
    """A server that has more rows than there are is no proof of delivery: stop, and say so."""
    with WandbServer() as server:
        service.up()
        start_online(service, server)
        rows = Rows(service.client("s"))
        rows.log(10)
        confirm(service, 10)
        script = """
            import wandb
            with wandb.init(project="p", id="run00001", resume="must") as run:
                for x in range(50):
                    run.log({"theirs": x})
        """
        assert run_client(script, tmp_path, server.url).returncode == 0
        rows.log(1)
        status = service.wait_for(lambda status: status.sink.state == "retrying")
        assert "somebody else writes to this run" in str(status.sink.last_error)
        assert status.sink.confirmed_rows <= 11
