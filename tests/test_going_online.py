"""Keys that come late, or are lost: what a run makes of it, with the real client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_service import LocalService, local_service
from online_service import KEY, Rows, check_run, confirm, set_environment
from wandb_client import sync
from wandb_file import read_runs
from wandb_server import WandbServer

from raywb.errors import SettingsConflict
from raywb.service import background
from raywb.service.state import load_state


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """A server that lets in nobody without the key."""
    with WandbServer(api_key=KEY) as server:
        yield server


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    set_environment(monkeypatch, tmp_path)
    monkeypatch.setattr(background, "KEY_INTERVAL_S", 0.5)
    with local_service(tmp_path) as local:
        yield local


def begin_offline(service: LocalService, server: WandbServer) -> Rows:
    """A run that is offline because nobody has a key, with rows in its files."""
    service.up()
    info, _ = service.start(mode=None, base_url=server.url, project="p")
    assert info.mode == "offline"
    client = service.client("s")
    client.config.update({"lr": 0.1})
    rows = Rows(client)
    rows.log(200)
    service.wait_for(lambda status: status.sink.applied_rows == 200)
    return rows


def finish(service: LocalService, server: WandbServer, rows: Rows) -> None:
    """Every row is at the server once, and nothing is left for `wandb sync` to upload again."""
    report = service.service.finish(60.0, 0)
    assert (report.complete, report.delivered_rows) == (True, rows.count), report
    assert (report.run.mode, report.run.began_offline) == ("online", True)
    check_run(server, rows.count)
    (run,) = server.runs.values()
    assert (run.run_id, run.config) == ("run00001", {"lr": 0.1})
    wandb_dir = service.directory / "wandb"
    assert list(wandb_dir.glob("offline-run-*")) == []
    assert read_runs(service.directory / "superseded")["run00001"].values("s/x")[:10] == [
        *range(10)
    ]


def test_a_start_brings_the_key(service: LocalService, server: WandbServer) -> None:
    """An offline run goes online with all of its rows, and stays so over a restart."""
    rows = begin_offline(service, server)
    info, joined = service.start(mode=None, base_url=server.url, project="p", api_key=KEY)
    assert (info.mode, joined) == ("online", True)
    rows.log(100)
    confirm(service, 300)
    state = load_state(service.directory)
    assert state is not None
    assert (state.runs[0].info.mode, state.runs[0].info.began_offline) == ("online", True)
    finish(service, server, rows)


def test_a_key_appears_on_the_head(
    service: LocalService, server: WandbServer, tmp_path: Path
) -> None:
    """A netrc that is written later is found, also by a service that was restarted meanwhile."""
    rows = begin_offline(service, server)
    service.down()
    service.up()
    netrc = Path(os.environ["HOME"]) / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    netrc.chmod(0o600)
    confirm(service, 200)
    assert service.status().run.mode == "online"
    rows.log(10)
    finish(service, server, rows)


def test_what_was_uploaded_by_hand_is_not_sent_again(
    service: LocalService, server: WandbServer, tmp_path: Path
) -> None:
    """Somebody synced the offline files before the key came: the server's rows are ours."""
    rows = begin_offline(service, server)
    (segment,) = (service.directory / "wandb").glob("offline-run-*")
    # What W&B's client holds back is written when it ends.
    service.down()
    service.up()
    service.wait_for(lambda status: status.sink.state == "running")
    synced = sync(segment, tmp_path, server.url)
    assert synced.returncode == 0, synced.stderr
    assert server.runs["tester/p/run00001"].row_count > 0
    service.start(mode=None, base_url=server.url, project="p", api_key=KEY)
    rows.log(50)
    confirm(service, 250)
    finish(service, server, rows)


def test_offline_by_name_stays_offline(service: LocalService, server: WandbServer) -> None:
    """Whoever asked for offline gets it, whoever brings a key, and a conflict is a conflict."""
    begin_offline(service, server)
    service.start(mode="offline", base_url=server.url, project="p")
    info, _ = service.start(mode=None, base_url=server.url, project="p", api_key=KEY)
    assert info.mode == "offline"
    with pytest.raises(SettingsConflict, match="mode is 'offline', not 'online'"):
        service.start(mode="online", base_url=server.url, project="p", api_key=KEY)
    assert service.service.finish(60.0, 0).complete
    assert server.runs == {}


def test_a_key_that_was_lost_is_asked_for(service: LocalService, server: WandbServer) -> None:
    """A service made again without the key says so, keeps rows, and waits for a start()."""
    service.up()
    service.start(mode="online", base_url=server.url, project="p", api_key=KEY)
    rows = Rows(service.client("s"))
    rows.log(100)
    confirm(service, 100)
    service.down()
    service.up()
    rows.log(100)
    status = service.wait_for(lambda status: status.sink.state == "no key")
    status = service.wait_for(lambda status: status.outbox_rows == 200)
    assert status.sink.restarts == 0
    (problem,) = status.problems
    assert f"no key for {server.url}" in problem
    assert "raywb.start()" in problem
    service.start(mode="online", base_url=server.url, project="p", api_key=KEY)
    confirm(service, 200)
    assert service.status().problems == []
    assert service.service.finish(60.0, 0).delivered_rows == 200
    check_run(server, 200)
