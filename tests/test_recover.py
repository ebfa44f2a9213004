"""raywb recover: the service and a process that logged were killed; their rows reach W&B once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from left_behind import LeftBehind
from local_service import local_service
from wandb_client import API_KEY
from wandb_file import read_run, read_runs
from wandb_server import WandbServer


@pytest.fixture
def left(tmp_path: Path) -> Iterator[LeftBehind]:
    with LeftBehind(tmp_path) as behind:
        yield behind


def check_rows(values: list[int], logged: int) -> None:
    """Every row whose log() had returned, once and in order; one more may have been written."""
    assert values == list(range(len(values)))
    assert len(values) in (logged, logged + 1)


def test_what_was_killed_is_brought_to_wandb(left: LeftBehind) -> None:
    """Offline: all rows are in W&B's files once, the run is crashed, and there is no more to do."""
    left.begin(project="demo")
    logged = left.kill()
    report = left.raywb("recover")
    (run,) = read_runs(left.directory).values()
    check_rows(run.values("s/x"), logged)
    rows = len(run.history)
    assert (run.steps, run.damaged, run.exit_code) == (list(range(rows)), 0, None)
    assert (run.summary["s/x"], run.summary["raywb/rejected"]) == ({"max": rows - 1}, 0)
    assert (run.config["lr"], run.project) == (0.5, "demo")
    assert [read_run(path).torn for path in run.segments[-1:]] == [0], "the file is complete"
    (recovered,) = report["runs"]
    assert (recovered["state"], recovered["complete"], recovered["lost"]) == ("crashed", True, {})
    assert recovered["received_rows"] == recovered["delivered_rows"] == rows
    assert (report["ledger_rows"], report["journals"], report["unconfirmed"]) == (rows, 1, [])
    assert list(left.journals.rglob("*.seg")) == [], "what is home was not cleared away"

    again = left.raywb("recover")
    assert (again["runs"], again["new_rows"], again["journals"]) == ([], 0, 0)
    assert read_runs(left.directory).popitem()[1].history == run.history
    text = run_plain(left, "recover")
    assert "nothing to do" in text


def run_plain(left: LeftBehind, *arguments: str) -> str:
    """The command as a person types it, without --json."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "raywb", arguments[0], str(left.directory), *arguments[1:]],
        env=left.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_exit_code_of_a_run_that_nobody_ended(left: LeftBehind) -> None:
    """--exit-code says how it ended, progress is told in plain lines, and a person can read it."""
    left.begin(project="demo")
    left.kill()
    text = run_plain(left, "recover", "--exit-code", "3")
    for part in ("Reading ledger and outbox", "Delivering demo-orchestrator", "failed", "damage"):
        assert part in text
    (run,) = read_runs(left.directory).values()
    assert run.exit_code == 3


def test_an_online_run_is_confirmed_and_crashed(left: LeftBehind) -> None:
    """Online: the server has every row and the summary, and was never told that the run ended."""
    with WandbServer(crashed_after_s=1.0) as server:
        key = left.directory.parent / "key"
        key.write_text(API_KEY)
        settings = {"mode": "online", "base_url": server.url, "api_key_file": str(key)}
        left.begin(project="demo", **settings)
        logged = left.kill()
        hidden = key.rename(key.with_name("hidden"))
        refused = left.raywb("recover", exit_code=1)
        assert "no W&B key" in refused["said"]
        hidden.rename(key)
        report = left.raywb("recover")
        (run,) = server.runs.values()
        check_rows(run.values("s/x"), logged)
        assert run.steps == list(range(len(run.history)))
        assert run.summary["s/x"] == {"max": run.last_step}
        assert run.exit_code is None, "W&B was told that the run ended"
        server.wait_until(lambda: run.state == "crashed")
        (recovered,) = report["runs"]
        assert (recovered["state"], recovered["complete"]) == ("crashed", True)
        assert recovered["delivered_rows"] == len(run.history)
        requests = server.requests["graphql:UpsertBucket"]
        assert left.raywb("recover")["runs"] == []
        assert server.requests["graphql:UpsertBucket"] == requests


def test_a_finish_that_was_cut_short_keeps_its_exit_code(left: LeftBehind) -> None:
    """A run that finish() was called for ends as that said, whoever was killed then."""
    with WandbServer() as server:
        server.misbehave(status=503)
        key = left.directory.parent / "key"
        key.write_text(API_KEY)
        left.begin(mode="online", base_url=server.url, api_key_file=str(key), rows=50)
        report = left.finish(0.5)
        assert (report["complete"], report["undelivered_rows"]) == (False, 50)
        assert f"raywb sync {left.directory}" in report["message"]
        left.kill()
        server.behave()
        (recovered,) = left.raywb("recover")["runs"]
        assert (recovered["state"], recovered["delivered_rows"]) == ("finished", 50)
        (run,) = server.runs.values()
        assert (run.values("s/x"), run.state) == (list(range(50)), "finished")


def test_copies_of_journals_from_other_nodes(left: LeftBehind, tmp_path: Path) -> None:
    """What lies elsewhere is found where --journals says; without it the source is unconfirmed."""
    left.begin(project="demo")
    logged = left.kill()
    node = tmp_path / "copies" / "node_7"
    shutil.move(left.journals, node)
    foreign = node / "another" / ("f" * 32)
    foreign.mkdir(parents=True)
    (foreign / "lock").touch()
    first = left.raywb("recover")
    (run,) = read_runs(left.directory).values()
    assert run.values("s/x") == list(range(len(run.history)))
    (source,) = first["unconfirmed"]
    assert source["acknowledged_bytes"] > 0
    assert source["received_rows"] == len(run.history)
    assert first["runs"][0]["unconfirmed"] == first["unconfirmed"]
    assert (node / next(node.iterdir()).name).exists()

    second = left.raywb("recover", "--journals", str(tmp_path / "copies"))
    (run,) = read_runs(left.directory).values()
    check_rows(run.values("s/x"), logged)
    assert run.steps == list(range(len(run.history)))
    assert second["new_rows"] == len(run.history) - first["ledger_rows"]
    assert (second["journals"], second["foreign_journals"]) == (1, 1)
    assert second["unconfirmed"] == []
    assert list(node.rglob(source["source_id"])), "a copy was removed"
    third = left.raywb("recover", "--journals", str(tmp_path / "copies"))
    assert (third["runs"], third["new_rows"], third["unconfirmed"]) == ([], 0, [])


def test_a_service_that_nobody_started(left: LeftBehind, tmp_path: Path) -> None:
    """Rows that came before any start() are in a run with the settings of who made the service."""
    del left
    with pytest.MonkeyPatch.context() as patch, local_service(tmp_path) as local:
        patch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
        local.up(project="early", provisional_wait_s=3600.0)
        client = local.client("s")
        client.log({"x": 0})
        assert client.flush()
        local.down()
        report = recover_here(local.directory)
        (run,) = report.runs
        assert (run.run.project, run.run.id, run.delivered_rows) == ("early", "run00001", 1)
        (written,) = read_runs(local.directory).values()
        assert (written.values("s/x"), written.project) == ([0], "early")


def recover_here(directory: Path, **options: Any) -> Any:
    from raywb.service.recover import recover

    return recover(directory, tell=lambda _: None, **options)


def test_damage_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte in the ledger and a torn end cost what they hit, and are named."""
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as local:
        local.up(provisional_wait_s=3600.0)
        client = local.client("s")
        for number in range(3):
            client.log({"x": number})
            assert client.flush()
        local.down()
        ledger = local.directory / "ledger" / f"{0:020d}.log"
        data = bytearray(ledger.read_bytes())
        where = data.rindex(b"RWL1", 0, data.rindex(b"RWL1"))  # the last but one
        data[where + 70] ^= 0xFF
        ledger.write_bytes(bytes(data) + b"RWL1torn")
        report = recover_here(local.directory)
        assert report.damage["ledger bytes torn at the end"] == 8
        assert (report.damage["ledger records"], report.damage["journal frames"]) == (1, 1)
        (run,) = report.runs
        assert (run.received_rows, run.lost) == (2, {"damaged_frames": 1})
        (written,) = read_runs(local.directory).values()
        assert written.values("s/x") == [0, 2]


def test_wrong_directories(left: LeftBehind, tmp_path: Path) -> None:
    """No directory, an empty one, one that is in use, one with a spoilt state: each is said."""
    assert "there is no directory" in left.raywb("recover", exit_code=6)["said"]
    left.directory.mkdir()
    assert "not the directory of a raywb service" in left.raywb("recover", exit_code=6)["said"]
    assert list(left.directory.iterdir()) == [], "an empty directory was written to"
    (left.directory / "service.json").write_text("{")
    assert "service.json cannot be read" in left.raywb("sync", exit_code=6)["said"]
    (left.directory / "service.json").unlink()
    left.begin(project="demo", rows=1)
    assert "a raywb service works in" in left.raywb("recover", exit_code=6)["said"]
    assert left.finish(60)["complete"]
    left.kill()
    gone = left.raywb("recover", "--journals", str(tmp_path / "nowhere"), exit_code=6)
    assert "in which journals could lie" in gone["said"]
