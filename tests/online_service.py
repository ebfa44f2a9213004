"""What tests of an online run share: rows that are logged, and what the server must have."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from local_service import LocalService
from wandb_client import API_KEY as KEY
from wandb_server import WandbServer

from raywb.client import Client

__all__ = ["KEY", "Rows", "check_run", "confirm", "set_environment"]


def set_environment(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Journals of the test's own, and a W&B client that sends every second, not every 15 s."""
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(directory / "journals"))
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")


class Rows:
    """Logs rows in a row, in stage ``s``, and lets nobody make ``log()`` wait."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.count = 0

    def log(self, rows: int) -> None:
        slowest_s = 0.0
        for _ in range(rows):
            began = time.perf_counter()
            self.client.log({"x": self.count}, step=self.count)
            slowest_s = max(slowest_s, time.perf_counter() - began)
            self.count += 1
        assert slowest_s < 0.5, "log() waited for W&B"
        assert self.client.flush(), "the service takes nothing while W&B is away"


def confirm(service: LocalService, rows: int, timeout_s: float = 60.0) -> None:
    """Wait until the server has shown so many rows; nobody has called finish()."""
    status = service.wait_for(lambda status: status.sink.confirmed_rows == rows, timeout_s)
    assert status.backlog_rows == 0


def check_run(server: WandbServer, rows: int, state: str = "finished") -> None:
    """Each row is at the server once, in order, in a run of that state."""
    (run,) = server.runs.values()
    assert run.values("s/x") == list(range(rows))
    assert run.steps == list(range(rows))
    assert (run.state, run.overwritten, run.group) == (state, 0, "group")
    assert run.summary["s/x"] == rows - 1
