"""Parts of the service that fail for a reason of their own: shown, counted and started again."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
from local_service import LocalService, local_service
from online_service import set_environment
from service_process import ServiceProcess
from wandb_file import read_runs

from raywb.service import background, runs, sink_process


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_environment(monkeypatch, tmp_path)


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """The next call ends with an exception that nobody expects there."""
    whole = getattr(owner, name)

    def fail(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(owner, name, whole)
        raise ZeroDivisionError(name)

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [
        (runs.Runs, "advance", "the merge"),
        (background, "sync_and_close", "the sync"),
        (sink_process, "_apply_request", "the sink of run run00001"),
    ],
)
def test_a_part_that_fails_goes_on(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, part: str
) -> None:
    """An exception that nobody expects ends no part for good, and stays in the status."""
    service.up()
    service.start()
    client = service.client("s")
    fail_once(monkeypatch, owner, name)
    client.log({"x": 1})
    assert client.flush()
    status = service.wait_for(lambda status: status.problems != [])
    assert status.problems == [
        f"{part} failed once and was started again; the last reason: ZeroDivisionError('{name}')"
    ]
    service.wait_for(lambda status: status.sink.applied_rows == 1)
    report = service.service.finish(60.0, 0)
    assert (report.complete, report.delivered_rows) == (True, 1), report


def test_no_descriptors_are_left(tmp_path: Path) -> None:
    """A service that can open nothing any more says so, and goes on when it can."""
    with local_service(tmp_path, ServiceProcess) as service:
        service.up()
        service.start()
        client = service.client("s")
        client.log({"x": 0})
        assert client.flush()
        service.wait_for(lambda status: status.sink.applied_rows == 1)
        process = service.service.process
        soft, hard = process.rlimit(resource.RLIMIT_NOFILE)
        process.rlimit(resource.RLIMIT_NOFILE, (3, hard))
        for sink in service.service.children("raywb.service.wandb_sink"):
            sink.kill()
        client.log({"x": 1})
        status = service.wait_for(
            lambda status: "Too many open files" in f"{status.sink.last_error}{status.problems}"
        )
        process.rlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert client.flush(20.0)
        report = service.service.finish(60.0, 0)
        assert (report.complete, report.delivered_rows) == (True, 2), (report, status)
    assert read_runs(tmp_path / "service")["run00001"].values("s/x") == [0, 1]
