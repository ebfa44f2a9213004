"""Every way in which a process begins, ends and shares a machine, without Ray.

The service runs in this process; whoever logs does so in real processes of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from local_service import CLUSTER, LocalService, local_service

from raywb import this_process
from raywb.client import Client
from raywb.cluster import Cluster
from raywb.connection import Connection
from raywb.found_journals import find_journals
from raywb.reports import RunInfo
from raywb.service.outbox import Outbox, OutRow
from raywb.settings import journal_base
from raywb.sweep import sweep_node
from raywb.this_process import connection_for

RUN = RunInfo(project="p", id="i", name="n", mode="disabled", dir="/d")

#: Users that need not exist on the machine, but for the first.
UIDS = (0, 54_321, 54_322)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as local:
        local.up()
        local.start(mode="disabled")
        yield local


@pytest.fixture
def client(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """The client of this process as ``attach()`` makes it, with what it does at a fork."""
    monkeypatch.setattr(this_process, "_present", None)
    connection = connection_for(CLUSTER, service.endpoint, 1)
    yield Client(connection, connection.open_channel("s", None, None), "s", RUN)
    connection.close(0.1)


def rows_of(service: LocalService) -> list[dict[str, Any]]:
    """The finished rows of the run, after the service has ended."""
    report = service.service.finish(20.0, 0)
    assert (report.lost, report.complete) == ({}, True)
    service.close()
    outbox = Outbox(service.directory / "outbox")
    rows = [
        {key.removeprefix("s/"): value for key, value in item.metrics.items()}
        for batch in outbox.recover()
        for item in batch.items
        if isinstance(item, OutRow)
    ]
    outbox.close()
    assert len(rows) == report.received_rows
    return rows


def test_workers_of_a_torch_data_loader_may_log(service: LocalService, client: Client) -> None:
    """Forked after attach(), each worker is a source of its own; rows of all arrive once."""
    data = pytest.importorskip("torch.utils.data", reason="this lane has no torch")

    class Logging(data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 200

        def __getitem__(self, index: int) -> int:
            client.log({"item": index, "pid": os.getpid()})
            return index

    for epoch in range(2):
        loader = data.DataLoader(Logging(), batch_size=10, num_workers=2)
        for batch in loader:
            client.log({"batch": int(batch[0]), "epoch": epoch})
    assert client.flush(20.0)
    assert service.sweep().failed == {}
    rows = rows_of(service)
    items = [row["item"] for row in rows if "item" in row]
    assert Counter(items) == Counter(list(range(200)) * 2)
    assert len({row["pid"] for row in rows if "item" in row}) == 4
    batches = [(row["epoch"], row["batch"]) for row in rows if "batch" in row]
    assert batches == [(epoch, first) for epoch in range(2) for first in range(0, 200, 10)]


#: A process that logs and then ends in its own way. Its own handlers run as they would without us.
ENDING = """
import atexit, json, os, signal, sys, threading
from raywb.client import Client
from raywb.cluster import Cluster
from raywb.this_process import connection_for
from raywb.reports import RunInfo
from raywb.shipping import Endpoint

way, cluster, endpoint = sys.argv[1], *map(json.loads, sys.argv[2:])

def mine():
    client.log({"way": way, "x": 100})
    print("mine", flush=True)

def terminated(number, frame):
    client.log({"way": way, "x": 99})
    sys.exit(7)

signal.signal(signal.SIGTERM, terminated)
atexit.register(mine)
connection = connection_for(Cluster(*cluster), Endpoint(**endpoint), 1)
run = RunInfo(project="p", id="i", name="n", mode="disabled", dir="/d")
client = Client(connection, connection.open_channel("s", None, None), "s", run)
for number in range(99):
    client.log({"way": way, "x": number})
match way:
    case "return":
        pass
    case "exit":
        sys.exit(3)
    case "exception":
        raise ValueError("the user's own")
    case "thread":
        threading.Thread(target=client.log, args=[{"way": way, "x": 99}]).start()
    case "_exit":
        os._exit(5)
    case "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    case "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
"""

#: How each way ends: exit code, whether the user's exit handler runs, and the last row.
ENDS = {
    "return": (0, True, 98),
    "exit": (3, True, 98),
    "exception": (1, True, 98),
    "thread": (0, True, 99),
    "_exit": (5, False, 98),
    "sigterm": (7, True, 99),
    "sigkill": (-signal.SIGKILL, False, 98),
}


def test_every_end_of_a_process_keeps_its_rows(service: LocalService) -> None:
    """However a process ends, unflushed rows arrive, and exit codes and handlers are its own.

    A row that the user's own exit handler logs, which runs after ours, is among them.
    """
    endpoint = service.endpoint
    where = {
        "address": endpoint.address,
        "token": endpoint.token,
        "cluster_id": endpoint.cluster_id,
    }
    root = str(Path(this_process.__file__).parent.parent)
    started = {
        way: subprocess.Popen(
            [sys.executable, "-c", ENDING, way, json.dumps(CLUSTER), json.dumps(where)],
            env={**os.environ, "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for way in ENDS
    }
    for way, (code, handled, _) in ENDS.items():
        printed, error = started[way].communicate(timeout=60)
        assert (started[way].returncode, "mine" in printed) == (code, handled), (way, error)
        assert ("Traceback" in error) == (way == "exception"), error
    swept = service.sweep()
    assert (swept.removed, swept.failed) == (len(ENDS), {})
    rows = rows_of(service)
    for way, (_, handled, last) in ENDS.items():
        mine = [row["x"] for row in rows if row["way"] == way]
        assert mine == [*range(last + 1), *[100] * handled], way


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory like /tmp, for several users; skips where this process cannot become another."""
    if os.getuid() != 0:
        pytest.skip("only root can be two users")
    path = Path(tempfile.mkdtemp(prefix="raywb-users-", dir="/tmp"))
    path.chmod(0o1777)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def as_user(uid: int, work: Callable[[], bool]) -> int:
    """Run in a child that is another user; returns its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return pid


@pytest.mark.parametrize("where", ["RAYWB_JOURNAL_DIR", "session", "TMPDIR"])
def test_two_users_on_one_machine(
    service: LocalService, shared: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whoever comes first, each user has journals of their own, which the others cannot read."""
    monkeypatch.delenv("RAYWB_JOURNAL_DIR")
    monkeypatch.setenv("TMPDIR", str(shared))
    session: Path | None = None
    if where == "RAYWB_JOURNAL_DIR":
        monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(shared / "of" / "all"))
    if where == "session":
        session = shared / "session"
        session.mkdir()
        session.chmod(0o1777)
    endpoint = service.endpoint
    cluster = Cluster(CLUSTER.cluster_id, CLUSTER.node_id, session and str(session))

    def work() -> bool:
        connection = Connection(cluster, endpoint, 1)
        user = Client(connection, connection.open_channel("s", None, None), "s", RUN)
        for number in range(50):
            user.log({"uid": os.getuid(), "x": number})
        return connection.journal is not None and user.flush(20.0) and user.stats.lost == {}

    for uid in (*UIDS, *UIDS):
        assert os.waitstatus_to_exitcode(os.waitpid(as_user(uid, work), 0)[1]) == 0, uid
    journals = [path.parent for path in shared.rglob("lock")]
    assert Counter(path.stat().st_uid for path in journals) == dict.fromkeys(UIDS, 2)
    for path in journals:
        assert (
            stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        )
    rows = rows_of(service)
    for uid in UIDS:
        assert [row["x"] for row in rows if row["uid"] == uid] == list(range(50)) * 2


def test_a_place_that_another_user_took_is_not_used(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another user owns what would be our directory, rows go elsewhere, or are counted."""
    monkeypatch.setenv("TMPDIR", str(shared))
    _, uid, other = UIDS

    def squat() -> bool:
        place = journal_base(None, CLUSTER.cluster_id).parent
        taken = place.with_name(place.name.replace(str(other), str(uid)))
        taken.mkdir(mode=0o777)
        taken.chmod(0o777)
        return True

    def work() -> bool:
        connection = Connection(CLUSTER, None, 1)
        user = Client(connection, connection.open_channel("s", None, None), "s", RUN)
        user.log({"x": 1})
        return connection.journal is None and user.stats.lost == {"no_journal": 1}

    assert os.waitstatus_to_exitcode(os.waitpid(as_user(other, squat), 0)[1]) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(as_user(uid, work), 0)[1]) == 0
    assert not list(shared.rglob("lock"))


def test_two_clusters_one_after_the_other(
    service: LocalService, client: Client, tmp_path: Path
) -> None:
    """What a process logged before it went to another cluster is in the first one's run."""
    for number in range(20):
        client.log({"x": number})
    with local_service(tmp_path / "second") as second:
        second.up()
        second.start(mode="disabled")
        elsewhere = Cluster("d" * 56, CLUSTER.node_id, None)
        second.service._parts.ingest._cluster_id = elsewhere.cluster_id
        endpoint = msgspec.structs.replace(second.endpoint, cluster_id=elsewhere.cluster_id)
        there = connection_for(elsewhere, endpoint, 1)
        other = Client(there, there.open_channel("s", None, None), "s", RUN)
        for number in range(20, 30):
            other.log({"x": number})
        client.log({"x": -1})
        assert client.stats.lost == {"after_close": 1}
        assert other.flush(10.0)
        there.close(5.0)
        assert [row["x"] for row in rows_of(second)] == list(range(20, 30))
    base = journal_base(None, CLUSTER.cluster_id)
    assert sweep_node([base], service.endpoint, time.monotonic() + 20).failed == {}
    assert list(find_journals(base)) == []
    assert [row["x"] for row in rows_of(service)] == list(range(20))
