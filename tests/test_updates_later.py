"""Tables, artifacts and alerts that W&B gets later: by sync, by recover, by a second finish."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from local_service import LocalService
from test_sync import sync
from test_updates import artifact_files, check_online, contents, log_all, tables_in
from wandb_file import read_runs
from wandb_server import WandbServer

from raywb.rows import Artifact, ArtifactFile
from raywb.service.outbox import Batch, OutAlert, Outbox, OutRow, OutTable
from raywb.service.recover import recover


def test_sync_sends_them_once(service: LocalService, tmp_path: Path) -> None:
    """`raywb sync` of an offline run brings all of it to the server; again, nothing is sent."""
    service.up()
    service.start(project="demo")
    client = service.client("s")
    directory = log_all(client, tmp_path)
    assert client.flush()
    assert service.service.finish(60.0, 0).complete
    with WandbServer() as server:
        assert [run.error for run in sync(service.directory, server)] == [None]
        upserts = check_online(server, directory).upserts
        assert [run.error for run in sync(service.directory, server)] == [None]
        assert check_online(server, directory).upserts == upserts


def test_recover_takes_files_from_a_dead_process(service: LocalService, tmp_path: Path) -> None:
    """Service and worker are gone: `raywb recover` brings the artifact's files from the journal."""
    service.up()
    service.start()
    client = service.client("s")
    client.log({"x": 0})
    client.log_table([{"n": 1}], "table")
    assert client.flush()
    connection = client._connection
    directory = artifact_files(tmp_path)
    service.down()
    pid = os.fork()
    if pid == 0:
        connection.after_fork_in_child()
        client.log_artifact(directory, "checkpoint", "model")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    report = recover(service.directory, journals=[tmp_path / "journals"], tell=lambda _: None)
    assert (report.failed, report.complete) == ({}, True), report
    (run,) = read_runs(service.directory).values()
    assert (run.exit_code, run.summary["s/table"]["_type"]) == (None, "table-file")
    assert tables_in(run.history) == [(1, "s/table")]
    (artifact,) = [one for one in run.artifacts if one.type == "model"]
    assert artifact.paths == tuple(sorted(contents(directory)))
    stored = {path.read_bytes() for path in (service.directory / "blobs").iterdir()}
    assert stored == set(contents(directory).values())


def test_a_second_finish_delivers_what_came_meanwhile(
    service: LocalService, tmp_path: Path
) -> None:
    """The files of an artifact come after finish(): the next one brings it to W&B."""
    service.up()
    service.start()
    client = service.client("s")
    client.log({"x": 1})
    path = tmp_path / "data.bin"
    path.write_bytes(b"data")
    digest = client._connection._frozen.take([("data.bin", path)])[0].digest
    client._connection.say(Artifact(0, "late", "dataset", [ArtifactFile("data.bin", digest, 4)]))
    assert client.flush()
    first = service.service.finish(60.0, 0)
    assert (first.complete, first.undelivered_updates) == (
        False,
        ["artifact 'late' (its files have not come)"],
    )
    service.sweep()
    second = service.service.finish(60.0, 0)
    assert (second.complete, second.undelivered_updates) == (True, []), second
    (run,) = read_runs(service.directory).values()
    assert [artifact.name for artifact in run.artifacts] == ["late"]
    assert run.values("s/x") == [1]


def test_damage_moves_no_other_update(tmp_path: Path) -> None:
    """A batch of the outbox that is damaged takes its updates with it; the others keep numbers."""
    outbox = Outbox(tmp_path)
    ends = []
    for number in range(3):
        table = OutTable("t", ["n"], [[number]])
        row = OutRow(1, 1.0, {}, table=table)
        alert = OutAlert(1, f"alert {number}", "", "INFO")
        outbox.append(Batch(1, 0, [], [OutRow(1, 1.0, {"x": number}), row, alert]))
        ends.append(outbox.end)
    outbox.close()
    (segment,) = [path for path in tmp_path.iterdir() if path.stat().st_size]
    data = bytearray(segment.read_bytes())
    data[(ends[0] + ends[1]) // 2] ^= 0xFF
    segment.write_bytes(data)
    outbox = Outbox(tmp_path)
    assert len(list(outbox.recover())) == 2
    assert (outbox.updates_of(1), outbox.rows_of(1)) == (6, 6)
    assert outbox.update(1, 5).item == OutAlert(1, "alert 2", "", "INFO")
    (row, item) = outbox.update(1, 4)
    assert (row, item.table.rows) == (5, [[2]])
    assert outbox.update_type(1, 2) is None
    with pytest.raises(OSError, match="update 2 of run 1 is damaged"):
        outbox.update(1, 2)
    outbox.close()
