"""A training's W&B run is gone on with after its cluster was killed, and after it was finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from left_behind import LeftBehind
from wandb_client import API_KEY
from wandb_server import WandbServer

import recipes.run_record
from recipes.errors import TrackingError
from recipes.run_record import RunFile, RunRecord
from recipes.stages.layout import write_json


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LeftBehind]:
    """A service and a process that logs, and no Ray cluster on which another service could be."""
    with LeftBehind(tmp_path) as behind:
        for name, value in behind.environment.items():
            monkeypatch.setenv(name, value)
        yield behind


def record(left: LeftBehind, mode: str) -> RunFile:
    file = RunFile(left.directory.parent / "run.json", resume=True)
    known = RunRecord("demo", "train001", "a name", mode, str(left.directory), group="group")
    write_json(file.path, dataclasses.asdict(known))
    return file


@pytest.mark.parametrize("finished", [False, True])
def test_the_next_start_goes_on_in_the_same_run(left: LeftBehind, finished: bool) -> None:
    """Killed or finished: the run at W&B has all rows of both starts, once each and in order.

    Offline, the same is in ``test_training_on_ray.py``.
    """
    with WandbServer() as server:
        key = left.directory.parent / "key"
        key.write_text(API_KEY)
        settings: dict[str, Any] = {
            "mode": "online",
            "base_url": server.url,
            "api_key_file": str(key),
        }
        rows = 40 if finished else -1
        left.begin(project="demo", run_id="train001", name="a name", rows=rows, **settings)
        if finished:
            assert left.finish(60)["complete"]
        logged = left.kill()
        said: list[str] = []
        chosen = record(left, "online").settings_for({"project": "demo"}, None, said.append)
        assert said[0] == "Going on in W&B run a name"
        assert said[1].startswith("Bringing home what earlier starts left in ")
        left.begin(first=100_000, rows=30, **(settings | chosen))
        report = left.finish(60)
        assert (report["complete"], report["state"]) == (True, "finished")
        left.kill()
        (run,) = server.runs.values()
    values = run.values("s/x")
    assert values[-30:] == list(range(100_000, 100_030))
    assert values[:-30] == list(range(len(values) - 30))
    assert len(values) - 30 in ((logged,) if finished else (logged, logged + 1))
    assert run.steps == list(range(len(run.history)))
    assert run.exit_code == 0
    assert run.run_id == "train001"


def test_a_run_that_wandb_does_not_have_yet_is_waited_for(left: LeftBehind) -> None:
    """W&B refuses what an earlier start logged: nothing new is put behind a gap, and it is said."""
    with WandbServer() as server:
        key = left.directory.parent / "key"
        key.write_text(API_KEY)
        left.begin(mode="online", base_url=server.url, api_key_file=str(key), rows=50)
        left.kill()
        key.unlink()
        with pytest.raises(TrackingError, match=r"cannot be gone on with now: .*no W&B key"):
            record(left, "online").settings_for({}, None, print)


def test_a_directory_in_use_is_told(left: LeftBehind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cluster's service is at work with the run: it is waited for a while, then said."""
    monkeypatch.setattr(recipes.run_record, "_IN_USE_S", 0.0)
    left.begin(project="demo", rows=1)
    with pytest.raises(TrackingError, match="a raywb service works in"):
        record(left, "offline").settings_for({}, None, print)
