"""What the end of the driver that opened the run means for the run; without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from local_service import CLUSTER, LocalService, local_service
from ray_cluster import until
from wandb_client import API_KEY
from wandb_file import WandbRun, read_runs
from wandb_server import WandbServer

from raywb.cluster import Cluster
from raywb.connection import Connection
from raywb.reports import RunInfo
from raywb.service import owner
from raywb.settings import journal_base

#: A driver as start() makes one: it owns the run, logs, and ends in the way that it is told.
DRIVER = """
import os, signal, sys
import msgspec
from local_service import CLUSTER
from raywb.client import Client
from raywb.this_process import connection_for
from raywb.reports import RunInfo
from raywb.shipping import Endpoint

endpoint = msgspec.json.decode(sys.argv[1], type=Endpoint)
run = msgspec.json.decode(sys.argv[2], type=RunInfo)
how, started_here = sys.argv[3], sys.argv[4] == "True"
cluster = CLUSTER._replace(job_id="01", is_driver=True, started_here=started_here)
connection = connection_for(cluster, endpoint, run.epoch)
connection.own(run)
client = Client(connection, connection.open_channel("s", None, None), "s", run)
for number in range(100):
    client.log({"x": number})
if how == "finish":
    connection.disown()
    raise RuntimeError("after finish()")
if how == "raise":
    raise RuntimeError("as the test asked")
if how == "exit":
    sys.exit(3)
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "fork":
    if os.fork() == 0:
        sys.exit(5)  # a child's end is not its parent's
    os.wait()
"""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as local:
        local.up()
        yield local


def drive(service: LocalService, run: RunInfo, how: str, *, started_here: bool = False) -> int:
    """A driver's life; returns its exit code."""
    texts = [msgspec.json.encode(value).decode() for value in (service.endpoint, run)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *texts, how, str(started_here)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    return done.returncode


def another_job(service: LocalService, stage: str) -> Connection:
    """A process of another job that has attached, and logged one row."""
    cluster: Cluster = CLUSTER._replace(job_id="02")
    connection = Connection(cluster, service.endpoint, 1)
    service._connections.append(connection)
    log(connection, connection.open_channel(stage, None, None))
    return connection


def log(connection: Connection, channel: int) -> None:
    from raywb.rows import Row, encode

    connection.append(encode(Row(channel, 1.0, None, {"x": 1})))
    assert connection.flush(20.0)


def written(service: LocalService) -> WandbRun:
    (run,) = read_runs(service.directory).values()
    return run


@pytest.mark.parametrize(
    ("how", "started_here", "exit_code", "state"),
    [
        ("raise", False, 1, "failed"),
        ("exit", False, 3, "failed"),
        ("raise", True, 1, "failed"),
        ("end", True, 0, "finished"),
        ("fork", True, 0, "finished"),
        ("end", False, 0, "running"),
        ("finish", False, 1, "running"),
    ],
)
def test_the_owners_end_is_the_runs(
    service: LocalService, how: str, started_here: bool, exit_code: int, state: str
) -> None:
    """An exception or an exit code fails the run; a good end finishes it if the cluster ends."""
    info, _ = service.start()
    assert drive(service, info, how, started_here=started_here) == exit_code
    if started_here:
        # Such a driver takes its cluster with it, so it has waited for the end of the run.
        assert service.status().finished
    if state == "running":
        service.wait_for(lambda status: status.sink.applied_rows == 100)
        service.wait_for(lambda status: all(source.ended for source in status.sources))
        assert not service.status().finished
        assert service.service.finish(60.0, 0).state == "finished"
    else:
        service.wait_for(lambda status: status.finished)
        report = service.service.finish(60.0, 0)
        assert (report.state, report.complete, report.delivered_rows) == (state, True, 100)
        assert written(service).exit_code == int(state == "failed")
    assert written(service).values("s/x") == list(range(100))


def test_what_cannot_be_read_does_not_keep_the_run_open(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken journal beside a failed owner's: the run ends after a while, and names it."""
    monkeypatch.setattr(owner, "SETTLE_S", 0.0)
    monkeypatch.setattr(owner, "SWEEP_S", 1.0)
    broken = journal_base(None, CLUSTER.cluster_id) / ("0" * 32)
    (broken / f"{0:020}.seg").mkdir(parents=True)
    (broken / "lock").touch()
    info, _ = service.start()
    assert drive(service, info, "raise") == 1
    service.wait_for(lambda status: status.finished)
    report = service.service.finish(60.0, 0)
    assert (report.state, report.delivered_rows) == ("failed", 100)
    assert [source.source_id for source in report.unconfirmed] == [broken.name]


def test_a_killed_owner_leaves_a_crashed_run(service: LocalService) -> None:
    """Its rows are confirmed, W&B sees no end; who attaches later brings the run back."""
    with WandbServer(crashed_after_s=2.0) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "0.5")
        key = service.directory.parent / "key"
        key.write_text(API_KEY)
        info, _ = service.start(mode="online", base_url=server.url, api_key_file=str(key))
        assert drive(service, info, "kill") == -signal.SIGKILL
        service.wait_for(lambda status: status.sink.state == "resting")
        (run,) = server.runs.values()
        assert run.values("s/x") == list(range(100))
        server.wait_until(lambda: run.state == "crashed")
        assert run.exit_code is None
        assert run.summary["s/x"] == 99
        assert not list(service.directory.parent.glob("journals/**/*.seg"))

        service.down()
        service.up()
        service.wait_for(lambda status: status.sink.state == "resting")
        another_job(service, "other")
        service.wait_for(lambda status: status.sink.state == "running")
        report = service.service.finish(60.0, 0)
        assert (report.state, report.delivered_rows) == ("finished", 101)
        assert (run.state, run.steps) == ("finished", list(range(101)))
        assert run.values("s/x") == list(range(100))
        assert run.values("other/x") == [1]


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_other_jobs_go_on_after_the_owner(service: LocalService, how: str) -> None:
    """With another job attached the run stays open, and takes that one's rows."""
    info, _ = service.start()
    other = another_job(service, "other")
    drive(service, info, how)
    if how == "kill":
        # A finish brings the dead driver's journal home, unless a neighbour just does; then only
        # the other job's own is left.
        until("the dead driver's journal to be home", lambda: service.sweep().journals == 1)
    service.wait_for(lambda status: status.sink.applied_rows == 101)
    until_seen = time.monotonic() + 4.0  # longer than a dead owner's run is left alone
    until("the owner's end to be seen", lambda: time.monotonic() > until_seen)
    log(other, other.open_channel("later", None, None))
    status = service.wait_for(lambda status: status.sink.applied_rows == 102)
    assert (status.sink.state, status.finished, status.sink.restarts) == ("running", False, 0)
    assert service.service.finish(60.0, 0).state == "finished"
    run = written(service)
    assert (run.values("s/x"), len(run.segments)) == (list(range(100)), 1)
    assert run.values("later/x") == [1]
