"""Tables, artifacts and alerts: each once, whatever is killed between the call and W&B."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from local_service import CLUSTER, LocalService, local_service
from wandb_client import sync
from wandb_file import LoggedArtifact, WandbRun, read_runs
from wandb_server import WandbServer
from wandb_store import ServerArtifact, ServerRun

from raywb import blobs, frozen
from raywb.client import Client
from raywb.errors import ArtifactError, MetricTypeError, SettingsError
from raywb.rows import MAX_MESSAGE_BYTES, PROTOCOL, Artifact, ArtifactFile, encode, frame
from raywb.tables import plain_table


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "RAYWB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as local:
        yield local


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


def kill_sink(service: LocalService) -> None:
    """End the sink's process and its wandb-core, as the kernel would."""
    for child in psutil.Process().children(recursive=True):
        name = "raywb.service.wandb_sink"
        if name in " ".join(child.cmdline()) or child.name().startswith("wandb-core"):
            child.send_signal(signal.SIGKILL)


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
    kill_sink(service)
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
    kill_sink(service)
    until(lambda: service.status().sink.restarts > 0 and service.status().sink.applied_rows == 4)
    service.down()
    service.up()
    service.wait_for(lambda status: not status.undelivered_updates)
    kill_sink(service)
    report = service.service.finish(90.0, 0)
    assert (report.complete, report.delivered_rows, report.undelivered_updates) == (True, 4, [])
    run = check_online(server, directory)
    assert run.state == "finished"
    # What the server has is deleted here, and what is home from the journal.
    assert not any((service.directory / "blobs").iterdir())
    assert not frozen.blobs_in(client._connection.journal.directory)
