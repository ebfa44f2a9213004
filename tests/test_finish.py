"""finish() again after one that was not complete takes in what it can reach, and tries again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_service import LocalService, local_service
from wandb_client import API_KEY
from wandb_file import read_run, read_runs
from wandb_server import WandbServer


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as local:
        local.up()
        yield local


@pytest.mark.parametrize("restart", [False, True])
def test_what_a_finish_missed_comes_with_the_next(service: LocalService, restart: bool) -> None:
    """A node did not answer: its rows join the run at the second finish, also after a restart."""
    service.start()
    client = service.client("s")
    client.log({"x": 0})
    assert client.flush()
    swept = service.sweep()
    swept.unreached.append("abc")
    first = service.service.finish(60.0, 3, swept)
    assert (first.complete, first.state, first.delivered_rows) == (False, "failed", 1)
    assert "node abc was not reached" in first.message
    if restart:
        service.down()
        service.up()
    again = service.service.finish(60.0, 0, swept)
    assert (again.complete, again.delivered_rows) == (False, 1)
    (run,) = read_runs(service.directory).values()
    assert len(run.segments) == 1, "nothing new came, and the run was opened again"

    client.log({"x": 1})
    assert client.flush(20.0)
    second = service.service.finish(60.0, 0, service.sweep())
    assert (second.complete, second.message, second.received_rows) == (True, None, 2)
    assert (second.delivered_rows, second.exit_code, second.state) == (2, 3, "failed")
    (run,) = read_runs(service.directory).values()
    assert (run.values("s/x"), run.steps) == ([0, 1], [0, 1])
    assert [read_run(path).exit_code for path in run.segments] == [3, 3]

    client.log({"x": 2})
    assert client.flush()
    assert service.service.finish(60.0, 0) == second, "a complete report changed"
    assert service.status().after_finish_rows == 1


def test_an_undelivered_finish_is_tried_again(service: LocalService, tmp_path: Path) -> None:
    """At its limit it says what is undelivered and where; the next one delivers it."""
    with WandbServer() as server:
        server.misbehave(status=503)
        key = tmp_path / "key"
        key.write_text(API_KEY)
        settings = {"base_url": server.url, "api_key_file": str(key), "sink_deadline_s": 3.0}
        service.start(mode="online", **settings)
        client = service.client("s")
        client.log({"x": 0})
        assert client.flush()
        first = service.service.finish(1.0, 0)
        assert (first.complete, first.state, first.undelivered_rows) == (False, "running", 1)
        assert f"`raywb sync {service.directory}`" in first.message
        client.log({"x": 1})
        assert client.flush()
        server.behave()
        second = service.service.finish(60.0, 0)
        assert (second.complete, second.state, second.delivered_rows) == (True, "finished", 2)
        (run,) = server.runs.values()
        assert (run.values("s/x"), run.state) == ([0, 1], "finished")


def test_an_end_that_nobody_waits_for_is_written_down(service: LocalService) -> None:
    """A finish() that came to its limit is complete later by itself, and stays so."""
    service.start()
    client = service.client("s")
    client.log({"x": 0})
    assert client.flush()
    assert not service.service.finish(0.0, 0).complete
    service.wait_for(lambda status: status.finished)
    service.down()
    service.up()
    report = service.service.finish(60.0, 0)
    assert (report.complete, report.delivered_rows) == (True, 1)
    (run,) = read_runs(service.directory).values()
    assert len(run.segments) == 1, "a run that had ended was opened again"
