"""Tables, artifacts and alerts: each once, whatever is killed between the call and W&B."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from child_processes import CORE, SINK, children, signal_all
from local_service import CLUSTER, LocalService
from wandb_client import sync
from wandb_file import WandbRun, read_runs
from wandb_server import WandbServer
from wandb_store import ServerArtifact, ServerRun

from raywb import blobs, frozen
from raywb.client import Client
from raywb.errors import ArtifactError, MetricTypeError, SettingsError, SinkError
from raywb.rows import MAX_MESSAGE_BYTES, PROTOCOL, Artifact, ArtifactFile
from raywb.service.blobs import BlobStore
from raywb.service.outbox import Batch, OutAlert, Outbox
from raywb.service.sink_messages import Updated
from raywb.service.state import UpdateMarks
from raywb.service.updates import Updates
from raywb.tables import plain_table


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as one:
        yield one


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)
    return found


def start_online(service: LocalService, server: WandbServer) -> None:
    key = service.directory.parent / "key"
    key.write_text("0" * 40)
    service.start(mode="online", base_url=server.url, api_key_file=str(key), project="demo")


def kill_sink() -> None:
    """End the sink's process and its wandb-core, as the kernel would."""
    signal_all(children(psutil.Process(), SINK, CORE), signal.SIGKILL)


def artifact_files(home: Path) -> Path:
    """A directory such as a checkpoint: a file of several pieces, a small one, an empty one."""
    directory = home / "checkpoint"
    (directory / "inner").mkdir(parents=True)
    (directory / "weights.bin").write_bytes(os.urandom(blobs.PIECE_BYTES * 2 + 12345))
    (directory / "inner" / "note.txt").write_text("hello")
    (directory / "empty").write_bytes(b"")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def log_all(client: Client, home: Path) -> Path:
    """One row, two tables, two artifacts, an alert, a row."""
    directory = artifact_files(home)
    client.log({"x": 0})
    client.log_table([{"a": 1, "b": "one"}, {"a": 2.5, "b": None}], "tables/first")
    client.log_artifact(directory, "checkpoint", "model")
    client.log_artifact(directory / "inner" / "note.txt", "note", "text")
    client.log_table([{"a": 1, "b": "one"}, {"a": 2.5, "b": None}], "second")
    client.alert("it stands still", "for an hour", level="WARN")
    client.log({"x": 1})
    return directory


def tables_in(history: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The step and key of each table in a history, flat as the readers return it."""
    return [
        (row["_step"], key.removesuffix("._type"))
        for row in history
        for key, value in row.items()
        if key.endswith("._type") and value == "table-file"
    ]


def check_offline(run: WandbRun, directory: Path) -> None:
    """Everything of `log_all` is in a run's files, once."""
    assert run.values("s/x") == [0, 1]
    assert tables_in(run.history) == [(1, "s/tables/first"), (2, "s/second")]
    logged = {(one.type, one.name): one for one in run.artifacts}
    assert len(run.artifacts) == len(logged) == 4, run.artifacts
    model = logged["model", "checkpoint"]
    assert model.paths == ("empty", "inner/note.txt", "weights.bin")
    assert logged["text", "note"].paths == ("note.txt",)
    assert run.alerts == [("it stands still", "for an hour")]
    # What the rows say of their tables leads to the tables' artifacts, and to their files.
    for step, key in tables_in(run.history):
        row = next(row for row in run.history if row["_step"] == step)
        assert row[f"{key}.artifact_path"].startswith("wandb-client-artifact://")
        # A sink that goes on for another one hands the file over again: the same one.
        found = [path for s in run.segments for path in s.parent.rglob(row[f"{key}.path"])]
        (text,) = {path.read_text() for path in found}
        assert json.loads(text)["data"] == [[1, "one"], [2.5, None]]
        assert run.summary[key]["sha256"] == row[f"{key}.sha256"]
    assert contents(directory)


def check_online(server: WandbServer, directory: Path) -> ServerRun:
    """Everything of `log_all` is on the server, once."""
    (run,) = server.runs.values()
    assert run.values("s/x") == [0, 1]
    assert tables_in(run.history) == [(1, "s/tables/first"), (2, "s/second")]
    versions = {(one.type, one.name): one for one in server.artifacts}
    assert len(versions) == len(server.artifacts) == 4
    assert all(one.committed and one.version == 0 for one in server.artifacts)
    assert versions["model", "checkpoint"].files == contents(directory)
    assert versions["text", "note"].files == {"note.txt": b"hello"}
    assert run.alerts == [("it stands still", "for an hour")]
    for step, key in tables_in(run.history):
        row = run.rows[step]
        artifact, path = referred(server, row[f"{key}.artifact_path"])
        assert json.loads(artifact.files[path])["data"] == [[1, "one"], [2.5, None]]
        assert row[f"{key}.path"] in run.files
        assert run.summary[key]["sha256"] == row[f"{key}.sha256"]
    return run


def referred(server: WandbServer, url: str) -> tuple[ServerArtifact, str]:
    """The artifact and path that a row refers to by a client's id."""
    client_id, _, path = url.removeprefix("wandb-client-artifact://").partition("/")
    (artifact,) = [one for one in server.artifacts if client_id in one.client_ids]
    return artifact, path


# ----------------------------------------------------------------------------------------------
# End to end


def test_offline_each_is_in_the_files_once(
    service: LocalService, server: WandbServer, tmp_path: Path
) -> None:
    """Offline, over a killed sink and a restarted service; and `wandb sync` makes one whole run."""
    service.up()
    service.start()
    client = service.client("s")
    directory = log_all(client, tmp_path)
    assert client.flush()
    service.wait_for(lambda status: status.sink.applied_rows == 4)
    kill_sink()
    client.log({"y": 1})
    service.wait_for(lambda status: status.sink.restarts > 0 and status.sink.applied_rows == 5)
    service.wait_for(lambda status: not status.undelivered_updates)
    service.down()
    service.up()
    report = service.service.finish(60.0, 0)
    assert (report.complete, report.delivered_rows, report.undelivered_updates) == (True, 5, [])
    assert not report.lost
    (run,) = read_runs(service.directory).values()
    check_offline(run, directory)
    for segment in run.segments:
        sync(segment.parent, tmp_path, server.url)
    check_online(server, directory)


def test_online_each_is_on_the_server_once(
    service: LocalService, server: WandbServer, tmp_path: Path
) -> None:
    """Online, with the sink killed again and again, and the service restarted."""
    service.up()
    start_online(service, server)
    client = service.client("s")
    directory = log_all(client, tmp_path)
    assert client.flush()
    until(lambda: server.requests["graphql:CreateArtifact"])
    kill_sink()
    until(lambda: service.status().sink.restarts > 0 and service.status().sink.applied_rows == 4)
    service.down()
    service.up()
    service.wait_for(lambda status: not status.undelivered_updates)
    kill_sink()
    report = service.service.finish(90.0, 0)
    assert (report.complete, report.delivered_rows, report.undelivered_updates) == (True, 4, [])
    run = check_online(server, directory)
    assert run.state == "finished"
    # What the server has is deleted here, and what is home from the journal.
    assert not any((service.directory / "blobs").iterdir())
    assert not frozen.blobs_in(client._connection.journal.directory)


def test_uploads_that_are_refused_arrive_in_the_end(
    service: LocalService, server: WandbServer, tmp_path: Path
) -> None:
    """W&B's storage refuses with 403 for a while: what failed is tried again until it is there."""
    service.up()
    start_online(service, server)
    client = service.client("s")
    service.wait_for(lambda status: status.sink.state == "running")
    server.misbehave("files", status=403, times=6)
    path = tmp_path / "data.bin"
    path.write_bytes(b"1" * 1000)
    client.log_artifact(path, "data", "dataset")
    client.log_table([{"a": 1}], "t")
    client.log({"x": 1})
    assert client.flush()
    report = service.service.finish(90.0, 0)
    assert (report.complete, report.delivered_rows) == (True, 2), report
    assert server.disturbed["files"] == 6
    assert [one.version for one in server.artifacts if one.committed] == [0, 0]
    assert {one.type for one in server.artifacts} == {"dataset", "run_table"}


def test_what_a_dead_sink_was_working_on_is_handed_over_again(
    service: LocalService, server: WandbServer, tmp_path: Path
) -> None:
    """The sink is killed in the middle of an upload: the next one of the same service does it."""
    service.up()
    start_online(service, server)
    client = service.client("s")
    service.wait_for(lambda status: status.sink.state == "running")
    server.hang("files")
    path = tmp_path / "data.bin"
    path.write_bytes(b"1" * 1000)
    client.log_artifact(path, "data", "dataset")
    assert client.flush()
    until(lambda: server.requests["graphql:CreateArtifactFiles"])
    assert service.status().undelivered_updates == ["artifact 'data' (on its way)"]
    kill_sink()
    server.behave("files")
    report = service.service.finish(60.0, 0)
    assert (report.complete, service.status().sink.restarts) == (True, 1), report
    (artifact,) = server.artifacts
    assert (artifact.committed, artifact.files) == (True, {"data.bin": b"1" * 1000})


def test_versions_are_numbered_in_the_order_of_logging(
    service: LocalService, server: WandbServer, tmp_path: Path
) -> None:
    """Versions of one name arrive one after the other; the same contents are the same version."""
    service.up()
    start_online(service, server)
    client = service.client("s")
    path = tmp_path / "model.bin"
    # The first ones take longest to upload.
    contents = [bytes([n]) * (1 + (3 - n) * 2_000_000) for n in (0, 0, 1, 2, 3)]
    for content in contents:
        path.write_bytes(content)
        client.log_artifact(path, "model", "model")
    client.log_artifact(path, "other", "model")
    assert client.flush()
    assert service.service.finish(60.0, 0).complete
    models = [one for one in server.artifacts if one.name == "model"]
    assert [one.version for one in models] == [0, 1, 2, 3]
    assert [one.files["model.bin"] for one in models] == contents[1:]


def test_an_artifact_whose_files_never_come_is_reported(service: LocalService) -> None:
    """A node that was lost with its disk: finish ends in time, and names what W&B lacks."""
    service.up()
    service.start()
    client = service.client("s")
    client.log({"x": 1})
    lost = Artifact(0, "gone", "model", [ArtifactFile("f", "ab" * 32, 7)])
    client._connection.say(lost)
    assert client.flush()
    started = time.monotonic()
    report = service.service.finish(60.0, 0)
    assert time.monotonic() - started < 30
    assert (report.delivered_rows, report.undelivered_rows, report.complete) == (1, 0, False)
    assert report.undelivered_updates == ["artifact 'gone' (its files have not come)"]
    assert "artifact 'gone'" in str(report.message)
    assert service.status().undelivered_updates == report.undelivered_updates


# ----------------------------------------------------------------------------------------------
# The lane of the files


def test_a_killed_workers_artifact_comes_home(service: LocalService, tmp_path: Path) -> None:
    """A worker killed right after log_artifact(): a sweep brings what the file was at the call."""
    service.up()
    service.start()
    client = service.client("s")
    client.log({"x": 0})
    assert client.flush()
    directory = artifact_files(tmp_path)
    before = contents(directory)
    pid = os.fork()
    if pid == 0:
        client._connection.after_fork_in_child()
        client.log_artifact(directory, "checkpoint", "model")
        (directory / "weights.bin").write_bytes(b"the next checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (directory / "inner" / "note.txt").unlink()
    until(lambda: service.sweep().journals == 1)
    report = service.service.finish(60.0, 0)
    assert report.complete, report
    (run,) = read_runs(service.directory).values()
    (artifact,) = run.artifacts
    assert artifact.paths == tuple(sorted(before))
    stored = {path.read_bytes() for path in (service.directory / "blobs").iterdir()}
    assert stored == set(before.values())


def test_a_journal_stays_until_its_files_are_home(
    service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep whose time is over in the middle of a file leaves the journal for the next one."""
    service.up(fsync="off")
    service.start()
    client = service.client("s")
    path = tmp_path / "data.bin"
    path.write_bytes(os.urandom(100_000))
    monkeypatch.setattr("raywb.blobs.PIECE_BYTES", 1000)
    connection = client._connection
    journal = connection.journal
    connection.shipper._blobs_at = math.inf  # the service takes rows, and no files
    client.log_artifact(path, "data", "dataset")
    until(lambda: journal.durable == journal.end)
    assert client.stats.waiting_files == 1
    connection.close(0.2)
    assert journal.directory.exists()
    status = service.wait_for(lambda status: len(status.sources) == 1)
    assert not status.sources[0].ended  # a sweep has to come for it
    report = service.sweep(timeout_s=0.05)
    assert list(report.failed) == [journal.source_id]
    assert len(frozen.blobs_in(journal.directory)) == 1
    until(lambda: service.sweep().removed == 1)
    assert not journal.directory.exists()
    (blob,) = (service.directory / "blobs").iterdir()
    assert blob.read_bytes() == path.read_bytes()


def test_a_big_file_delays_no_rows_and_goes_on_after_a_restart(
    service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a file is on its way rows overtake it; a new service goes on where the old one was."""
    monkeypatch.setattr("raywb.blobs.PIECE_BYTES", 512)
    service.up()
    service.start()
    client = service.client("s")
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(2_000_000))
    client.log_artifact(path, "big", "model")
    partial = until(lambda: next((service.directory / "blobs").glob("*.part"), None))
    for number in range(3):
        client.log({"x": number})
        service.wait_for(lambda status: status.received_rows == number + 1, 3.0)  # noqa: B023
        assert partial.exists()
    service.down()
    half = partial.stat().st_size
    assert 0 < half < 2_000_000
    asked: list[int] = []
    send = blobs.Frozen.path

    def note(self: frozen.Frozen, digest: str) -> Path:
        asked.append(partial.stat().st_size if partial.exists() else -1)
        return send(self, digest)

    monkeypatch.setattr("raywb.blobs.PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(frozen.Frozen, "path", note)
    service.up()
    assert client.flush(20.0)
    assert min(size for size in asked if size >= 0) >= half
    assert service.service.finish(60.0, 0).complete
    assert (service.directory / "blobs" / partial.stem).read_bytes() == path.read_bytes()


def put(service: LocalService, path: str, body: bytes, **headers: str) -> int:
    endpoint = service.endpoint
    connection = http.client.HTTPConnection(*endpoint.address.split(":"), timeout=20)
    known = {
        "Authorization": f"Bearer {endpoint.token}",
        "X-Raywb-Cluster": CLUSTER.cluster_id,
        "X-Raywb-Protocol": str(PROTOCOL),
    }
    known |= {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request("PUT", path, body=body, headers=known)
    return connection.getresponse().status


DIGEST = hashlib.sha256(b"hello").hexdigest()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (f"{DIGEST}?offset=0&size=5", {"Authorization": "Bearer wrong"}, 401),
        (f"{DIGEST}?offset=0&size=5", {"X_Raywb_Cluster": "another"}, 403),
        (f"{DIGEST}?offset=0&size=5", {"X_Raywb_Protocol": "999"}, 426),
        (f"{DIGEST.upper()}?offset=0&size=5", {}, 400),
        ("..%2f..%2f..%2ftmp%2fevil?offset=0&size=5", {}, 400),
        (f"{DIGEST}?offset=-1&size=5", {}, 400),
        (f"{DIGEST}?offset=0", {}, 400),
        (f"{DIGEST}?offset=0&size={10**17}", {}, 413),
        (f"{DIGEST}?offset=0&size=4", {}, 409),
        (f"{'0' * 64}?offset=0&size=5", {}, 409),
        (f"{DIGEST}?offset=0&size=5", {}, 200),
    ],
)
def test_strangers_and_wrong_files_are_refused(
    service: LocalService, path: str, headers: dict[str, str], status: int
) -> None:
    """What may not be sent, or is not what its digest says, is refused and leaves no file."""
    service.up()
    before = {found for found in service.directory.parent.rglob("*") if found.is_file()}
    assert put(service, f"/v1/blobs/{path}", b"hello", **headers) == status
    after = {found for found in service.directory.parent.rglob("*") if found.is_file()}
    assert after - before == ({service.directory / "blobs" / DIGEST} if status == 200 else set())


def test_a_hostile_artifact_goes_nowhere(service: LocalService) -> None:
    """Paths and digests that lead elsewhere are damage, and reach no sink."""
    service.up()
    service.start()
    client = service.client("s")
    for path, digest in [
        ("../../../evil", DIGEST),
        ("/etc/evil", DIGEST),
        ("a\\..\\evil", DIGEST),
        ("fine", "../../service.json"),
    ]:
        client._connection.say(Artifact(0, "evil", "model", [ArtifactFile(path, digest, 5)]))
    assert client.flush()
    report = service.service.finish(60.0, 0)
    assert report.complete, report
    assert report.lost == {"damaged_frames": 4}
    (run,) = read_runs(service.directory).values()
    assert run.artifacts == []


# ----------------------------------------------------------------------------------------------
# What is taken, and what is refused


class Frame:
    """Neither pandas nor pyarrow."""


def test_tables_of_every_kind() -> None:
    """Lists of dicts, pyarrow and pandas tables become the same plain rows."""
    dicts = [{"a": np.int64(1), "b": "x"}, {"b": None, "c": True}]
    assert plain_table(dicts)[:2] == (["a", "b", "c"], [[1, "x", None], [None, None, True]])
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"a": [1, None], "b": ["x", "y"]})
    assert plain_table(table)[:2] == (["a", "b"], [[1, "x"], [None, "y"]])
    pandas = pytest.importorskip("pandas")
    day = pandas.Timestamp("2026-01-02")
    frame = pandas.DataFrame({"a": [1, 2], "when": [day, pandas.NaT]})
    rows = [[1, "2026-01-02T00:00:00"], [2, None]]
    assert plain_table(frame)[:2] == (["a", "when"], rows)


def test_refused_tables_are_counted(
    service: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad value is left out of its table, a bad table altogether; a strict client raises."""
    service.up()
    service.start()
    client = service.client("s")
    with caplog.at_level(logging.WARNING, "raywb"):
        client.log_table([{"a": 1, "b": object()}, {"a": 2, "b": [3]}], "half")
        client.log_table(Frame(), "none")
        client.log_table([{"a": "x" * MAX_MESSAGE_BYTES}], "large")
    texts = " ".join(record.getMessage() for record in caplog.records)
    assert all(word in texts for word in ("half/b", "Frame", "log_artifact() takes it as a file"))
    assert (client.stats.rejected, client.stats.logged) == (4, 1)
    strict = service.client("s", strict=True)
    with pytest.raises(MetricTypeError, match="pandas or pyarrow"):
        strict.log_table("text", "t")
    assert client.flush()
    report = service.service.finish(60.0, 0)
    assert (report.received_rows, report.rejected) == (1, 4)
    (run,) = read_runs(service.directory).values()
    assert tables_in(run.history) == [(0, "s/half")]


def test_refused_artifacts_are_counted(
    service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be taken says why, and leaves nothing behind."""
    service.up()
    client, strict = service.client("s"), service.client("s", strict=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "back").symlink_to(tmp_path / "loop")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "fifo")
    (tmp_path / "file").write_bytes(b"12345")
    monkeypatch.setattr("raywb.frozen.MAX_ARTIFACT_BYTES", 4)
    for name, why in {
        "missing": "no file and no directory",
        "empty": "holds no file",
        "loop": "leads back",
        "pipe": "no regular file",
        "file": "5 bytes, and 4 are most",
    }.items():
        with pytest.raises(ArtifactError, match=why):
            strict.log_artifact(tmp_path / name, "a", "model")
        client.log_artifact(tmp_path / name, "a", "model")
    assert client.stats.rejected == 5
    monkeypatch.setattr("raywb.frozen.MAX_ARTIFACT_BYTES", 5)
    monkeypatch.setattr("raywb.frozen._FICLONE", 0)
    monkeypatch.setattr("raywb.frozen.LEFT_FREE", 1.0)
    strict.log_artifact(tmp_path / "file", "a", "model")
    assert strict.stats.lost == {"artifact_disk_full": 1}
    for one in (client, strict):
        assert not list((one._connection.journal.directory).glob("blobs/*"))
    for name, kind in (("a/b", "model"), ("", "model"), ("a", "wandb-x"), ("run-1", "run_table")):
        with pytest.raises(SettingsError, match="cannot be used"):
            client.log_artifact(tmp_path / "file", name, kind)


def test_alerts_are_checked(service: LocalService) -> None:
    """A wrong level is an error at once; a title that W&B would not take is cut, not lost."""
    service.up()
    service.start()
    client = service.client()
    with pytest.raises(SettingsError, match="level='warn' cannot be used: it is one of INFO"):
        client.alert("t", "x", level="warn")
    client.alert("t" * 100, "why")
    assert client.flush()
    assert service.service.finish(60.0, 0).complete
    (run,) = read_runs(service.directory).values()
    assert run.alerts == [("t" * 62 + "…", "t" * 100 + "\n\nwhy")]


def test_an_alert_is_sent_at_most_once(tmp_path: Path) -> None:
    """A sink that dies at an alert: it is not sent again, and counted as unconfirmed."""
    outbox, marks = Outbox(tmp_path), UpdateMarks()
    outbox.append(
        Batch(1, 0, [], [OutAlert(1, "first", "", "INFO"), OutAlert(1, "next", "", "INFO")])
    )
    sent: list[str] = []

    async def ask(request: Any, _: Any) -> Updated:
        sent.append(request.title)
        if request.title == "first":
            raise SinkError("the sink's process ended")
        return Updated()

    def incarnation() -> Updates:
        one = Updates(1, outbox, BlobStore(tmp_path), marks, lambda: None, lambda: None)
        one.begin_session(None)
        return one

    with pytest.raises(SinkError):
        asyncio.run(incarnation().step(ask, 0))
    last = incarnation()
    asyncio.run(last.step(ask, 0))
    last.end_session([])
    assert sent == ["first", "next"]
    assert last.undelivered(closed=True) == []
    assert (last.unconfirmed_alerts, marks.before) == (1, 2)


def test_many_tables_come_through_the_pipe(service: LocalService) -> None:
    """What the sink says of many tables is longer than a pipe, and so are their names for W&B."""
    service.up()
    client = service.client("s")
    for number in range(400):
        client.log_table([{"n": number}], f"table_{number}_{'x' * 200}")
    assert client.flush()
    service.start()
    service.wait_for(lambda status: status.sink.applied_rows == 400, 60.0)
    assert service.status().sink.restarts == 0
