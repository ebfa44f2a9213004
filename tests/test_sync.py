"""raywb sync, and plain `wandb sync`: a run reaches W&B's server later, whole, each row once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_processes import SINK, children, signal_all
from left_behind import LeftBehind
from local_service import LocalService
from wandb_client import API_KEY, client_environment, run_client
from wandb_client import sync as wandb_sync
from wandb_file import read_runs
from wandb_server import WandbServer

from raywb.errors import SettingsError
from raywb.reports import SyncedRun
from raywb.service.sync import sync as sync_directory


def log_and_finish(
    service: LocalService, values: range, *, exit_code: int = 0, **settings: Any
) -> str:
    """One run with these values; returns its id."""
    if service.service is None:
        service.up()
    info, _ = service.start(**settings)
    client = service.client("s")
    client.define_metric("x", summary="max")
    for value in values:
        client.log({"x": value}, step=value)
    assert client.flush()
    assert service.service.finish(60.0, exit_code).complete
    run_id: str = info.id
    return run_id


def sync(directory: Path, server: WandbServer, **options: Any) -> list[SyncedRun]:
    """Sync in this process, with a key in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", API_KEY)
        options = {"base_url": server.url, "timeout_s": 60.0, **options}
        return sync_directory(directory, tell=lambda _: None, **options).runs


def numbers(runs: list[SyncedRun]) -> list[tuple[int, int, int, str, str | None]]:
    return [(run.rows, run.rows_before, run.rows_sent, run.state, run.error) for run in runs]


def test_offline_runs_are_sent_once(service: LocalService) -> None:
    """Every run of a directory, also beside a living service; again, nothing is sent."""
    first = log_and_finish(service, range(30), project="p", tags=("t",))
    second = log_and_finish(service, range(100, 105), project="p", exit_code=2)
    with WandbServer() as server:
        runs = sync(service.directory, server)
        assert numbers(runs) == [(30, 0, 30, "finished", None), (5, 0, 5, "failed", None)]
        there = server.runs
        one, two = (there[f"tester/p/{run_id}"] for run_id in (first, second))
        assert (one.values("s/x"), one.steps) == (list(range(30)), list(range(30)))
        assert (two.values("s/x"), two.state) == (list(range(100, 105)), "failed")
        assert (one.state, one.group, one.tags) == ("finished", "group", ("t",))
        assert one.summary["s/x"] == {"max": 29}
        assert one.metrics["s/*"].step_metric == "s/step"
        assert runs[0].run.url.startswith(server.url)
        upserts = one.upserts
        again = sync(service.directory, server)
        assert numbers(again) == [(30, 30, 0, "finished", None), (5, 5, 0, "failed", None)]
        assert (one.row_count, one.upserts) == (30, upserts)


def test_what_wandb_sync_sent_is_not_sent_again(service: LocalService, tmp_path: Path) -> None:
    """After `wandb sync` of the run's files only its end is told anew; a stranger's run is left."""
    run_id = log_and_finish(service, range(20), project="p")
    service.down()
    with WandbServer() as server:
        for directory in (service.directory / "wandb").glob("offline-run-*"):
            wandb_sync(directory, tmp_path, server.url)
        (run,) = server.runs.values()
        assert run.values("s/x") == list(range(20))
        assert numbers(sync(service.directory, server)) == [(20, 20, 0, "finished", None)]
        assert run.steps == list(range(20))

    with WandbServer() as server:
        stranger = f"""
            import wandb
            run = wandb.init(project="p", id="{run_id}")
            for k in range(7):
                run.log({{"theirs": k}})
            run.finish()
        """
        assert run_client(stranger, tmp_path, server.url).returncode == 0
        (synced,) = sync(service.directory, server)
        assert "another run with the id" in (synced.error or "")
        (run,) = server.runs.values()
        assert run.row_count == 7
        assert numbers(sync(service.directory, server, project="q")) == [
            (20, 0, 20, "finished", None)
        ]
        assert server.runs[f"tester/q/{run_id}"].values("s/x") == list(range(20))


def test_a_sync_that_is_killed_goes_on(service: LocalService) -> None:
    """A sync that is killed has sent a part; the next one sends the rest, and no row twice."""
    log_and_finish(service, range(6000), project="p")
    service.down()
    with WandbServer() as server:
        environment = client_environment(service.directory.parent, server.url) | {
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.1"
        }
        command = [sys.executable, "-m", "raywb", "sync", str(service.directory)]
        process = psutil.Popen(
            [*command, "--base-url", server.url],
            env=environment,
            cwd=Path(__file__).parent.parent,
            stderr=subprocess.DEVNULL,
        )
        server.wait_until(lambda: any(run.row_count > 100 for run in server.runs.values()))
        process.kill()
        process.wait()
        (run,) = server.runs.values()
        sent = run.row_count
        (synced,) = sync(service.directory, server)
        assert (synced.error, synced.rows, synced.state) == (None, 6000, "finished")
        assert synced.rows_before >= sent > 100
        assert synced.rows_before + synced.rows_sent == 6000
        print(f"{sent} rows before the kill, {synced.rows_before} after, {run.overwritten}")
        assert run.values("s/x") == list(range(6000))
        assert (run.steps, run.overwritten) == (list(range(6000)), 0)


def test_the_same_run_id_twice(service: LocalService) -> None:
    """Two runs under one id lie one behind the other at the server, as they do in the files."""
    for first in (0, 100):
        log_and_finish(service, range(first, first + 5), project="p", run_id="again")
    with WandbServer() as server:
        for before, sent in ((0, 5), (5, 0)):
            assert (
                numbers(sync(service.directory, server))
                == [(5, before, sent, "finished", None)] * 2
            )
            (run,) = server.runs.values()
            assert run.values("s/x") == [*range(5), *range(100, 105)]


def test_an_undelivered_finish_is_delivered_by_sync(tmp_path: Path) -> None:
    """What a finish() at its limit named is delivered by the command that it named."""
    with WandbServer() as server, LeftBehind(tmp_path) as left:
        server.misbehave(status=503)
        key = tmp_path / "key"
        key.write_text(API_KEY)
        left.begin(mode="online", base_url=server.url, api_key_file=str(key), rows=40)
        report = left.finish(0.5)
        assert (report["received_rows"], report["delivered_rows"]) == (40, 0)
        assert f"`raywb sync {left.directory}`" in report["message"]
        at_work = left.raywb("sync", exit_code=5)["runs"]
        assert "a raywb service is at work on it" in at_work[0]["error"]
        left.kill()
        server.behave()
        (run,) = left.raywb("sync")["runs"]
        assert (run["rows"], run["rows_before"], run["rows_sent"]) == (40, 0, 40)
        (there,) = server.runs.values()
        assert (there.values("s/x"), there.state) == (list(range(40)), "finished")
        assert left.raywb("recover")["runs"] == [], "recover did not know of it"


def test_a_run_that_was_never_finished_is_named(tmp_path: Path) -> None:
    """sync leaves an open run to recover; a run that was left as crashed stays crashed."""
    with WandbServer(crashed_after_s=1.0) as server, LeftBehind(tmp_path) as left:
        left.begin(project="p")
        left.kill()
        key = {"WANDB_API_KEY": API_KEY}
        (run,) = left.raywb("sync", "--base-url", server.url, exit_code=5, **key)["runs"]
        assert f"raywb recover {left.directory}" in run["error"]
        assert server.runs == {}
        left.raywb("recover")
        (run,) = left.raywb("sync", "--base-url", server.url, **key)["runs"]
        (there,) = server.runs.values()
        assert there.values("s/x") == list(range(run["rows"]))
        assert (there.exit_code, run["state"]) == (None, "crashed")
        assert there.summary["s/x"] == {"max": run["rows"] - 1}


def test_without_a_key_nothing_is_tried(service: LocalService) -> None:
    """No key: the error names the server and what to do."""
    log_and_finish(service, range(1), project="p")
    with pytest.raises(SettingsError, match=r"http://127.0.0.1:9.*WANDB_API_KEY"):
        sync_directory(service.directory, base_url="http://127.0.0.1:9", tell=lambda _: None)


def test_wandb_sync_of_all_segments_is_one_whole_run(service: LocalService, tmp_path: Path) -> None:
    """Sinks and services were killed; `wandb sync` of the segments by age gives each row once."""
    service.up()
    service.start(project="p")
    client = service.client("s")
    client.define_metric("x", summary="max")
    logged = 0
    for round_ in range(4):
        for _ in range(100):
            client.log({"x": logged}, step=logged)
            logged += 1
        assert client.flush(20.0)
        if round_ == 3:
            break
        service.wait_for(lambda status: status.sink.applied_rows > 0)
        if round_ % 2:
            service.down()
            service.up()
        else:
            signal_all(children(psutil.Process(), SINK), signal.SIGKILL)
    assert service.service.finish(90.0, 0).complete
    (written,) = read_runs(service.directory).values()
    assert len(written.segments) >= 3
    with WandbServer() as server:
        for segment in written.segments:
            done = wandb_sync(segment.parent, tmp_path, server.url)
            assert done.returncode == 0, done.stderr
        (run,) = server.runs.values()
        assert run.values("s/x") == list(range(logged))
        assert (run.steps, run.state) == (list(range(logged)), "finished")
        assert run.summary["s/x"] == {"max": logged - 1}
        assert run.metrics["s/*"].step_metric == "s/step"
