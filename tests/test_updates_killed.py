"""Tables, artifacts and alerts while the sink is killed at random moments, again and again.

The seed is printed, and ``RAYWB_SEED`` repeats it. ``RAYWB_LONG=1`` makes many more rounds.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from local_service import LocalService
from test_updates import kill_sink, referred, start_online, tables_in
from wandb_file import read_runs
from wandb_server import WandbServer

from raywb.client import Client

LONG = bool(os.environ.get("RAYWB_LONG"))
SEED = os.environ.get("RAYWB_SEED")

#: Kills of the sink; every third round the service is restarted too.
ROUNDS = 30 if LONG else 3


@pytest.fixture
def chance() -> random.Random:
    seed = int(SEED or random.SystemRandom().randrange(2**32))
    print(f"RAYWB_SEED={seed}")
    return random.Random(seed)


def log_round(client: Client, number: int, home: Path) -> None:
    """A row, a table and an artifact of contents of their own, an alert."""
    client.log({"x": number})
    client.log_table([{"n": number}], "table")
    path = home / "file"
    path.write_text(f"content {number}")
    client.log_artifact(path, "data", "dataset")
    client.alert(f"alert {number}", "")


def kill_at_random(service: LocalService, chance: random.Random, home: Path) -> int:
    """Log and kill; returns how many rounds were logged."""
    client = service.client("s")
    for number in range(ROUNDS):
        log_round(client, number, home)
        assert client.flush()
        time.sleep(chance.uniform(0.0, 3.0))  # the moment of the kill is what is random
        kill_sink()
        if number % 3 == 1:
            service.down()
            service.up()
    log_round(client, ROUNDS, home)
    assert client.flush()
    return ROUNDS + 1


def test_online_each_once(service: LocalService, chance: random.Random, tmp_path: Path) -> None:
    """On the server each table and artifact is there once, and each alert at most once."""
    with WandbServer() as server:
        service.up()
        start_online(service, server)
        count = kill_at_random(service, chance, tmp_path)
        report = service.service.finish(120.0, 0)
        assert (report.complete, report.delivered_rows) == (True, 2 * count), report
        (run,) = server.runs.values()
        assert run.values("s/x") == list(range(count))
        tables = tables_in(run.history)
        assert [key for _, key in tables] == ["s/table"] * count
        for number, (step, key) in enumerate(tables):
            artifact, path = referred(server, run.rows[step][f"{key}.artifact_path"])
            assert json.loads(artifact.files[path])["data"] == [[number]]
            assert run.rows[step][f"{key}.path"] in run.files
        data = [one for one in server.artifacts if one.type == "dataset"]
        wanted = [{"file": f"content {number}".encode()} for number in range(count)]
        assert sorted(one.files["file"] for one in data) == sorted(one["file"] for one in wanted)
        assert len(server.artifacts) == 2 * count
        assert all(one.committed for one in server.artifacts)
        titles = [title for title, _ in run.alerts]
        assert len(set(titles)) == len(titles)
        assert count - len(titles) <= report.lost.get("alert_unconfirmed", 0)


def test_offline_each_once(service: LocalService, chance: random.Random, tmp_path: Path) -> None:
    """In the run's files each table, artifact and alert is there once."""
    service.up()
    service.start()
    count = kill_at_random(service, chance, tmp_path)
    report = service.service.finish(120.0, 0)
    assert (report.complete, report.delivered_rows, report.lost) == (True, 2 * count, {}), report
    (run,) = read_runs(service.directory).values()
    assert run.values("s/x") == list(range(count))
    tables = tables_in(run.history)
    assert [key for _, key in tables] == ["s/table"] * count
    assert len({one.digest for one in run.artifacts}) == len(run.artifacts) == 2 * count
    assert run.alerts == [(f"alert {number}", "") for number in range(count)]
    paths = {str(path) for segment in run.segments for path in segment.parent.rglob("*.json")}
    for step, key in tables:
        row = next(row for row in run.history if row["_step"] == step)
        assert any(path.endswith(row[f"{key}.path"]) for path in paths)
