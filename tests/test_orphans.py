"""Who is killed, hung or lost: its journal comes home by itself, or is shown as unconfirmed."""

from __future__ import annotations

import io
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from local_service import CLUSTER, LocalService, local_service
from ray_cluster import until
from rich.console import Console
from wandb_file import read_runs

from raywb import orphans
from raywb.blobs import BlobLane
from raywb.found_journals import find_journals, sole_sweeper
from raywb.frozen import Frozen
from raywb.journal import Journal, new_source_id
from raywb.orphans import sweep_node
from raywb.reports import SweepReport
from raywb.rows import Channel, End, Hello, Row, encode, end_of_source, frame
from raywb.service import sweeps
from raywb.service.ingest import REQUESTS_PER_S, paces
from raywb.service.liveness import Liveness
from raywb.service.sweeps import PAUSE_RANGE_S, SweepPlan
from raywb.settings import journal_base
from raywb.shipping import Endpoint, Sender, Shipper
from raywb.view.terminal import render_report, render_status


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    monkeypatch.setattr(orphans, "LOOK_INTERVAL_S", 0.3)
    monkeypatch.setattr(sweeps, "LOOK_INTERVAL_S", 0.1)
    with local_service(tmp_path) as local:
        yield local


def base() -> Path:
    return journal_base(None, CLUSTER.cluster_id)


def hello(source_id: str, node_id: str = CLUSTER.node_id) -> Hello:
    return Hello(source_id, CLUSTER.cluster_id, node_id, 1, os.getpid(), "host", 0.0, "1")


def killed_process(
    stage: str, rows: int, *, torn: bytes = b"", source_id: str | None = None
) -> str:
    """A process that logs and kills itself right after; returns the source that it was."""
    source_id = source_id or new_source_id()
    pid = os.fork()
    if pid == 0:
        journal = Journal(base(), source_id)
        for message in (hello(source_id), Channel(0, stage, None, None)):
            journal.append(encode(message), counted=False)
        for number in range(rows):
            journal.append(encode(Row(0, 0.0, number, {"i": number})))
        if torn:
            with open(journal.segments.path(0), "ab") as file:
                file.write(torn)
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return source_id


class Here:
    """The way to the nodes of a cluster of one machine; what is ``gone`` cannot be reached."""

    def __init__(self) -> None:
        self.swept: list[list[str]] = []
        self.gone: set[str] = set()
        self.error: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()

    def sweep(
        self, node_ids: Collection[str], address: str, token: str, timeout_s: float
    ) -> SweepReport:
        self.swept.append(sorted(node_ids))
        assert self.hold.wait(timeout_s)
        if self.error is not None:
            raise self.error
        endpoint = Endpoint(address=address, token=token, cluster_id=CLUSTER.cluster_id)
        report = SweepReport()
        if not self.gone:
            report = sweep_node([base()], endpoint, time.monotonic() + timeout_s)
        report.gone = sorted(self.gone & set(node_ids))
        return report


def values(service: LocalService, key: str) -> list[float]:
    (run,) = read_runs(service.directory).values()
    return run.values(key)


# -- neighbours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsync", ["off", "every_second"])
def test_a_neighbour_brings_home_what_the_killed_left(service: LocalService, fsync: str) -> None:
    """A live process ships the journals beside its own, says that they ended, and removes them."""
    service.up(fsync=fsync)
    service.start()
    client = service.client("alive")
    client.log({"i": 0})
    dead = [killed_process(f"dead_{number}", 50 + number) for number in range(3)]
    status = service.wait_for(lambda status: sum(s.killed for s in status.sources) == 3)
    assert {source.source_id for source in status.sources if source.killed} == set(dead)
    assert status.received_rows == 1 + 50 + 51 + 52
    until("their journals to be removed", lambda: len(list(base().glob("*/lock"))) == 1, 20)
    assert client.stats.failed_requests == 0
    report = service.service.finish(60.0, 0)
    assert (report.complete, report.lost, report.unconfirmed) == (True, {}, [])
    for number in range(3):
        assert values(service, f"dead_{number}/i") == list(range(50 + number))


@pytest.mark.parametrize("bytes_left", [3, 15, 40])
def test_a_torn_frame_is_counted_and_stops_nobody(service: LocalService, bytes_left: int) -> None:
    """Killed in the middle of a write: every whole row comes, and the journal goes."""
    service.up(fsync="every_second")
    service.start()
    torn = frame(encode(Row(0, 0.0, 7, {"x" * 100: 7.0})))[:bytes_left]
    source_id = killed_process("dead", 7, torn=torn)
    report = service.sweep()
    assert (report.journals, report.removed, report.failed) == (1, 1, {})
    assert not (base() / source_id).exists()
    report = service.service.finish(60.0, 0)
    # Whether its log() returned, or bits of its length flipped, nobody can tell: it is counted.
    assert (report.received_rows, report.complete) == (7, True)
    assert report.lost == {"damaged_frames": 1}


def test_a_journal_that_cannot_be_read_stops_nobody(service: LocalService) -> None:
    """One that is damaged beyond reading is counted and passed over; the others come home."""
    service.up()
    service.start()
    broken = killed_process("broken", 5, source_id="0" * 32)  # the first that is looked at
    segment = base() / broken / f"{0:020d}.seg"
    segment.rename(base() / broken / "aside")
    segment.mkdir()
    dead = [killed_process(f"dead_{number}", 5) for number in range(4)]
    client = service.client("alive")
    service.wait_for(lambda status: sum(s.killed for s in status.sources) == len(dead))
    assert client.stats.failed_requests > 0
    assert client.flush()
    segment.rmdir()
    (base() / broken / "aside").rename(segment)
    service.wait_for(lambda status: status.received_rows == 25)


def test_requests_for_others_leave_room_for_ours(service: LocalService, tmp_path: Path) -> None:
    """However much others left: few requests between two of ours, and a flush does not wait."""
    service.up()
    service.start()
    steps = itertools.count()

    def endless(sender: Sender) -> bool:
        next(steps)
        sender.send(new_source_id(), 0, b"")
        return True

    journal = Journal(base())
    journal.append(encode(hello(journal.source_id)), counted=False)
    blobs = BlobLane(Frozen(journal.directory), lambda reason: None)
    shipper = Shipper(journal, service.endpoint, lambda: None, blobs, endless)
    shipper.start()
    began = time.monotonic()
    for _ in range(20):
        journal.append(encode(Row(0, 0.0, None, {"x": 1.0})))
        assert shipper.flush(5.0)
    # A request takes milliseconds; a wait for the pace after each would come to five seconds.
    assert time.monotonic() - began < 3.0
    flushed = next(steps)
    began = time.monotonic()
    time.sleep(1.0)
    paces_gone = (time.monotonic() - began) / 0.25
    assert 2 <= next(steps) - flushed <= 4 * (paces_gone + 2)
    shipper.stop()


def test_a_forked_child_neither_keeps_nor_frees_a_lock(service: LocalService) -> None:
    """While a dead journal is looked after, a child of who does so changes nothing about it."""
    service.up()
    killed_process("dead", 1)
    (ours,) = find_journals(base())
    assert ours.is_free
    if (pid := os.fork()) == 0:
        ours.release()
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    try:
        assert [journal.is_free for journal in find_journals(base())] == [False]
        ours.release()
        (again,) = find_journals(base())
        assert again.is_free
        again.release()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_one_process_of_a_machine_looks_around(tmp_path: Path) -> None:
    """Of all that ask, one sweeps; another one not before the interval is over."""
    with sole_sweeper(tmp_path / "nobody", 0.0) as ours:
        assert not ours
    with sole_sweeper(tmp_path, 60.0) as first, sole_sweeper(tmp_path, 0.0) as second:
        assert (first, second) == (True, False)
        if (pid := os.fork()) == 0:
            time.sleep(30)  # a child that has inherited the lock
            os._exit(0)
    try:
        with sole_sweeper(tmp_path, 60.0) as again:
            assert not again
        with sole_sweeper(tmp_path, 0.0) as again:
            assert again
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# -- silent nodes ----------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def journal_bytes(source_id: str, node_id: str) -> bytes:
    return frame(encode(hello(source_id, node_id)))


END = frame(encode(End(1.0)))


def test_only_unattended_nodes_are_swept_with_growing_pauses() -> None:
    """A node is due when its sources are silent, later ever more seldom, and never once ended."""
    clock = Clock()
    liveness = Liveness(clock)
    plan = SweepPlan(liveness, clock)
    first, second, other = (new_source_id() for _ in range(3))
    liveness.announce(first, "node")
    liveness.note(second, 0, journal_bytes(second, "node"))
    liveness.note(other, 0, journal_bytes(other, "other"))
    assert plan.due(30.0) == {}
    clock.now += 31
    liveness.hear(second, 0, quiet=True)
    assert plan.due(30.0) == {"other": {other}}, "a node with a live client looks after itself"
    liveness.note(other, 100, END)
    clock.now += 31
    assert plan.due(30.0) == {"node": {first, second}}
    swept_at = [clock.now]
    while clock.now < 40_000:
        clock.now += 1
        if plan.due(30.0):
            swept_at.append(clock.now)
    pauses = [later - earlier for earlier, later in itertools.pairwise(swept_at)]
    assert pauses[:4] == [30.0, 60.0, 120.0, 240.0]
    assert max(pauses) == PAUSE_RANGE_S[1]
    assert len(pauses) < 18
    liveness.hear(first, 0, quiet=False)
    assert plan.due(30.0) == {}
    clock.now += 31
    assert plan.due(30.0) == {"node": {first, second}}, "who spoke in between is swept for at once"
    for source_id in (first, second):
        liveness.note(source_id, 100, END)
    clock.now += 10_000
    assert (plan.due(30.0), liveness.outstanding) == ({}, {})


def test_an_end_is_seen_only_where_it_is_the_last_frame() -> None:
    """Rows after an end mean that the source goes on; a damaged end is none."""
    liveness = Liveness()
    source_id = new_source_id()
    start = journal_bytes(source_id, "node")
    row = frame(encode(Row(0, 0.0, None, {"x": 1.0})))
    liveness.note(source_id, 0, start + END)
    assert liveness.has_ended(source_id)
    liveness.note(source_id, len(start + END), row)
    assert not liveness.has_ended(source_id)
    assert liveness.outstanding == {"node": {source_id}}
    liveness.note(source_id, 500, row + frame(encode(End(2.0, killed=True))))
    assert liveness.has_ended(source_id)
    assert liveness.killed == {source_id}
    assert end_of_source(b"") is None
    assert end_of_source(END[1:]) is None
    shorter = frame(encode(End(1.0))[:-1].replace(b"\x93", b"\x92", 1))
    assert end_of_source(shorter + b"x") is None
    assert end_of_source(END[:-1] + b"\x00\x00") is None


def test_a_silent_node_is_swept_once_and_a_quiet_one_never(service: LocalService) -> None:
    """Whoever lives says so with nothing to log; what a killed last process left comes home."""
    nodes = Here()
    service.up(silent_after_s=0.9, nodes=nodes)
    service.start()
    client = service.client("quiet")
    client.log({"x": 1.0})
    assert client.flush()
    began = time.monotonic()
    while time.monotonic() - began < 2.5:
        assert [source.heard_ago_s < 0.9 for source in service.status().sources] in ([], [True])
        time.sleep(0.1)
    assert nodes.swept == []
    client._connection.close(5.0)
    killed_process("dead", 20)
    # Nobody has told the service of it: it learns of one by its announcement.
    service.service.join(1, 5.0, (new_source_id(), "silent node"))
    status = service.wait_for(lambda status: any(source.killed for source in status.sources))
    assert status.received_rows == 21
    assert nodes.swept == [["silent node"]]
    (lost,) = service.wait_for(lambda status: bool(status.unconfirmed)).unconfirmed
    assert (lost.node_id, lost.reason) == (
        "silent node",
        "its journal was found nowhere on its node",
    )


def test_a_hung_process_is_alive_and_its_rows_come(service: LocalService) -> None:
    """A stopped process holds its journal: it is read from outside, and nothing is unconfirmed."""
    nodes = Here()
    service.up(silent_after_s=0.6, nodes=nodes)
    service.start()
    journal = Journal(base())
    for message in (hello(journal.source_id), Channel(0, "hung", None, None)):
        journal.append(encode(message), counted=False)
    with_hello = service.sweep()
    assert with_hello.alive == [journal.source_id]
    journal.append(encode(Row(0, 0.0, 1, {"i": 1})))
    status = service.wait_for(lambda status: status.received_rows == 1)
    assert (status.unconfirmed, status.sources[0].ended) == ([], False)
    assert len(nodes.swept) == 1
    journal.close()


def test_a_sweep_that_fails_or_hangs_is_shown(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong on the way to the nodes, the service goes on and says what it was."""
    monkeypatch.setattr(sweeps, "PAUSE_RANGE_S", (0.2, 0.2))
    monkeypatch.setattr(sweeps, "SWEEP_TIMEOUT_S", 0.3)
    nodes = Here()
    nodes.error = RuntimeError("no such cluster")
    service.up(silent_after_s=0.3, nodes=nodes)
    service.start()
    service.service.join(1, 5.0, (new_source_id(), "node"))
    service.wait_for(lambda status: any("no such cluster" in text for text in status.problems))
    nodes.error = None
    nodes.hold.clear()
    monkeypatch.setattr(sweeps, "SWEEP_TIMEOUT_S", 20.0)
    client = service.client("s")
    client.log({"x": 1.0})
    assert client.flush(), "the service waits for a sweep"
    nodes.hold.set()
    service.wait_for(lambda status: not any("swept" in text for text in status.problems))


# -- lost nodes ------------------------------------------------------------------------------------


def rendered(draw: Callable[[], object]) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(draw())
    return console.file.getvalue()


def test_a_lost_node_leaves_its_sources_unconfirmed(service: LocalService) -> None:
    """They are shown with what was acknowledged and how many rows are known to be missing."""
    nodes = Here()
    service.up(silent_after_s=0.9, nodes=nodes)
    service.start()
    sender = Sender(service.endpoint)
    ids = {}
    # One had seven rows more than came, one was quiet, and one is only swept for.
    for name, rows in (("busy", 17), ("quiet", 10), ("unknown", None)):
        ids[name] = source_id = new_source_id()
        data = journal_bytes(source_id, "lost") + frame(encode(Channel(0, name, None, None)))
        data += b"".join(frame(encode(Row(0, 0.0, i, {"i": i}))) for i in range(10))
        end = sender.send(source_id, 0, data, rows=rows).end
        if name == "quiet":
            sender.send(source_id, end, b"", rows=rows)
    nodes.gone = {"lost"}
    status = service.wait_for(lambda status: len(status.unconfirmed) == 3)
    lost = {source.source_id: source for source in status.unconfirmed}
    assert {source.reason for source in lost.values()} == {"its node is gone"}
    assert {source.node_id for source in lost.values()} == {"lost"}
    assert {source.received_rows for source in lost.values()} == {10}
    assert {source.acknowledged_bytes for source in lost.values()} >= {end}
    known = {name: lost[source_id].unacknowledged_rows for name, source_id in ids.items()}
    assert known == {"busy": 7, "quiet": 0, "unknown": None}
    assert [lost[ids[name]].quiet for name in ids] == [False, True, False]
    assert "at least 7 rows missing" in rendered(lambda: render_status(status))

    # The same disk comes back as another node, and with it one of the journals.
    sender.send(ids["unknown"], end + 3, frame(encode(End(0.0, killed=True))), gap=True)
    service.wait_for(lambda status: len(status.unconfirmed) == 2)

    report = service.service.finish(60.0, 0, SweepReport(gone=["lost"]))
    assert {source.source_id for source in report.unconfirmed} == {ids["busy"], ids["quiet"]}
    assert (report.received_rows, report.delivered_rows) == (30, 30)
    assert not report.complete
    assert "1 sources are unconfirmed, with at least 7 rows" in report.message
    assert "its node is gone" in rendered(lambda: render_report(report))
    assert service.service.finish(60.0, 0) == report
    (run,) = read_runs(service.directory).values()
    assert run.summary["raywb/unconfirmed_sources"] == 1
    assert run.summary["raywb/unconfirmed_rows"] == 7

    # What one run has reported is no news for the next one, nor for the next incarnation.
    service.down()
    service.up(silent_after_s=0.9, nodes=nodes)
    service.start()
    again = service.service.finish(60.0, 0, SweepReport(gone=["lost"]))
    assert (again.unconfirmed, again.complete, again.message) == ([], True, None)


def test_a_finish_tells_what_its_sweep_could_not_have(service: LocalService) -> None:
    """Out of reach, not home, or found nowhere: each is a reason; who lives is none of these."""
    service.up()
    service.start()
    client = service.client("alive")
    client.log({"x": 1.0})
    assert client.flush()
    ids = [new_source_id() for _ in range(3)]
    for source_id, node_id in zip(ids, ("silent", "full", "odd"), strict=True):
        service.service.join(1, 5.0, (source_id, node_id))
    assert service.service.outstanding() == sorted([CLUSTER.node_id, "silent", "full", "odd"])
    time.sleep(2.0)  # longer than an announcement counts as a sign of life
    swept = service.sweep()
    swept.unreached, swept.failed = ["silent"], {ids[1]: "no space left"}
    report = service.service.finish(60.0, 0, swept)
    assert {source.source_id: source.reason for source in report.unconfirmed} == {
        ids[0]: "its node did not answer in time",
        ids[1]: "its journal is not home: no space left",
        ids[2]: "its journal was found nowhere on its node",
    }
    assert (report.received_rows, report.complete) == (1, False)


def test_liveness_is_the_same_after_a_restart(service: LocalService) -> None:
    """Who ended and who did not is read from the ledger; then all nodes are outstanding."""
    service.up()
    service.start()
    killed = killed_process("dead", 3)
    service.sweep()
    client = service.client("alive")
    client.log({"x": 1.0})
    assert client.flush()
    alive = client._connection.journal.source_id
    client._connection.shipper.stop()
    service.down()
    service.up()
    states = {s.source_id: (s.ended, s.killed) for s in service.status().sources}
    assert states == {killed: (True, True), alive: (False, False)}
    assert service.service.outstanding() is None


def test_many_sources_stay_within_the_bound() -> None:
    """However many have something to give or only say that they live: as many requests at most."""
    for live, quiet in itertools.product((0, 1, 10, 1_000, 10_000), (0, 1, 1_000, 100_000)):
        pace_s, keep_alive_s = paces(live, quiet, 30.0)
        assert live / pace_s + quiet / keep_alive_s <= REQUESTS_PER_S + 1e-6, (live, quiet)
        assert keep_alive_s >= max(10.0, pace_s)
    assert paces(1, 0, 30.0) == paces(1, 100, 30.0) == (0.25, 10.0)
