"""From log() to W&B's file without Ray: the plain service class, real HTTP, the real client."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_processes import CORE, SINK, children, signal_all
from local_service import CLUSTER, LocalService, local_service
from ray_cluster import until
from wandb_file import read_runs
from wandb_server import WandbServer

from raywb.errors import ServiceUnavailable, SettingsConflict
from raywb.rows import PROTOCOL, Row, encode, frame
from raywb.service import live_rows, live_stage
from raywb.service.actor import RaywbService
from raywb.service.state import load_state
from raywb.settings import Settings


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "RAYWB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    # Online, W&B's client sends every 15 s unless it is told otherwise.
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")
    with local_service(tmp_path) as local:
        yield local


def history(service: LocalService, run_id: str = "run00001") -> list[dict]:
    return read_runs(service.directory)[run_id].history


def test_a_service_that_starts_is_waited_for(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked before it works, it answers as soon as it does, and says after a while why not."""
    service.up()
    port = int(service.endpoint.address.rsplit(":", 1)[1])
    service.down()
    with ThreadPoolExecutor() as threads, contextlib.ExitStack() as stack:
        with socket.create_server(("127.0.0.1", port)):
            made = RaywbService(LocalService.boot(service.directory))
            stack.callback(made.close)
            with monkeypatch.context() as patch:
                patch.setattr("raywb.service.actor.START_WAIT_S", 0.2)
                with pytest.raises(ServiceUnavailable, match=r"not ready: cannot work in .*use"):
                    made.status()
            asked = threads.submit(made.status)
            with pytest.raises(TimeoutError):
                asked.result(0.1)
        assert asked.result(10).address.endswith(f":{port}")


def test_a_run_from_log_to_file(service: LocalService) -> None:
    """Rows, axes, config, summary and definitions reach W&B's own file, and finish counts them."""
    service.up()
    info, joined = service.start(project="demo", name="n", tags=("t",), notes="why")
    assert not joined
    client = service.client("training/operator")
    client.config.update({"lr": 0.1, "model": {"layers": 2}})
    client.define_metric("acc", summary="max")
    for step in (1, 2, 3):
        client.log({"loss": 1.0 / step, "acc": 0.9 - 0.1 * step, "note": "é"}, step=step * 10)
    client.log({"nan": math.nan, "inf": math.inf, "nested": {"deep": {"x": True}}})
    client.summary["best"] = 7
    assert client.flush()
    report = service.service.finish(60.0, 0)
    assert (report.received_rows, report.delivered_rows, report.undelivered_rows) == (4, 4, 0)
    assert report.complete, report
    assert report.run.dir == str(service.directory)
    (run,) = read_runs(service.directory).values()
    assert (run.run_id, run.project, run.group, run.job_type, run.name) == (
        info.id,
        "demo",
        "group",
        "orchestrator",
        "n",
    )
    assert run.config["lr"] == 0.1
    assert run.config["model"] == {"layers": 2}
    assert run.exit_code == 0
    assert [row["training/operator/step"] for row in run.history[:3]] == [10, 20, 30]
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3]
    assert run.history[1]["training/operator/note"] == "é"
    assert run.history[3]["training/operator/nested/deep/x"] is True
    axes = run.metrics
    assert axes["training/operator/*"].step_metric == "training/operator/step"
    assert axes["training/operator/acc"].summary == {"max"}
    assert run.summary["training/operator/acc"] == {"max": 0.8}
    assert run.summary["training/operator/best"] == 7
    assert run.summary["raywb/rejected"] == 0
    assert service.service.finish(60.0, 0) == report


@pytest.mark.parametrize("fsync", ["off", "every_second", "each"])
def test_restarts_lose_nothing_and_repeat_nothing(service: LocalService, fsync: str) -> None:
    """Over restarts of the service, each row is in the run's files once and in order."""
    service.up(fsync=fsync)
    service.start()
    client = service.client("s")
    port = service.status().address
    for incarnation in range(1, 4):
        for number in range(200):
            client.log({"x": incarnation * 1000 + number})
        if incarnation == 2:
            assert client.flush()
            service.wait_for(lambda status: status.sink.applied_rows > 0)
        service.down()
        client.log({"x": incarnation * 1000 + 200})
        service.up(fsync=fsync)
        assert service.status().incarnation == incarnation + 1
        assert service.status().address == port
    assert client.flush(20.0)
    report = service.service.finish(60.0, 0)
    assert report.complete, report
    expected = [k * 1000 + number for k in range(1, 4) for number in range(201)]
    assert [row["s/x"] for row in history(service)] == expected
    assert report.received_rows == report.delivered_rows == len(expected)


@pytest.mark.parametrize("victim", ["sink", "wandb-core"])
def test_a_killed_sink_is_replaced(service: LocalService, victim: str) -> None:
    """When the sink or its wandb-core is killed, the next one goes on behind the last row."""
    service.up(sink_deadline_s=20.0)
    service.start()
    client = service.client("s")
    logged = 0
    for _ in range(2):
        for _ in range(300):
            client.log({"x": logged, "peak": -logged})
            logged += 1
        assert client.flush()
        service.wait_for(lambda status: status.sink.applied_rows >= logged)  # noqa: B023
        name = CORE if victim == "wandb-core" else SINK
        signal_all(children(psutil.Process(), name), signal.SIGKILL)
        client.log({"x": logged, "peak": -logged})
        logged += 1
        assert client.flush()
    report = service.service.finish(90.0, 1)
    assert report.complete, report
    (run,) = read_runs(service.directory).values()
    assert [row["s/x"] for row in run.history] == list(range(logged))
    assert [row["_step"] for row in run.history] == list(range(logged))
    assert len(run.segments) >= 2
    assert run.summary["s/x"] == logged - 1
    assert run.exit_code == 1
    assert service.status().sink.restarts >= 2


def test_a_summary_of_the_whole_run_survives_a_restart(service: LocalService) -> None:
    """Aggregates and last values cover what was logged before W&B's client was replaced."""
    service.up()
    service.start()
    client = service.client("s")
    client.define_metric("loss", summary="max")
    client.log({"loss": 90.0, "once": 1})
    assert client.flush()
    service.wait_for(lambda status: status.sink.applied_rows == 1)
    service.down()
    service.up()
    client.log({"loss": 5.0})
    assert client.flush(20.0)
    assert service.service.finish(60.0, 0).complete
    (run,) = read_runs(service.directory).values()
    assert run.summary["s/loss"] == {"max": 90.0}
    assert run.summary["s/once"] == 1
    assert run.metrics["s/loss"].summary == {"max"}


def test_the_same_run_id_twice(service: LocalService) -> None:
    """Offline, a second run under the id of the first goes on behind it, as W&B would."""
    service.up()
    client = None
    for epoch in (1, 2):
        service.start(run_id="again")
        client = client or service.client("s")
        client.log({"x": epoch})
        assert client.flush()
        report = service.service.finish(60.0, 0)
        assert (report.complete, report.delivered_rows) == (True, 1), report
    rows = history(service, "again")
    assert [(row["_step"], row["s/x"]) for row in rows] == [(0, 1), (1, 2)]


def test_a_directory_serves_one_service(service: LocalService) -> None:
    """A second service in a directory that is in use waits, and says why."""
    service.up()
    first = service.service
    with pytest.raises(AssertionError):
        service.up(join_s=0.5)
    second, service.service = service.service, first
    assert "another raywb service works in" in second._problems["service"]
    service.down()
    service.service = second
    assert second.join(PROTOCOL, 20.0)["address"]


def test_a_full_disk_at_the_start_is_no_open_run(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a run cannot be written down it is not open, and the next start() opens it."""
    service.up(provisional_wait_s=3600.0)
    client = service.client("s")
    client.log({"x": 1})
    assert client.flush()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("raywb.service.runs.save_state", refuse)
        with pytest.raises(OSError, match="No space"):
            service.start()
    assert not service.start()[1]
    report = service.service.finish(60.0, 0)
    assert (report.received_rows, report.delivered_rows, report.complete) == (1, 1, True)


def test_series_keep_their_own_axes(service: LocalService) -> None:
    """Rows of two series in one namespace, interleaved, hold their own axis and no other."""
    service.up()
    service.start()
    client = service.client()
    series = [client.open_series("xenna", label=kind, axis="t") for kind in ("one", "two")]
    for moment in range(3):
        for number, one in enumerate(series):
            one.log({"t": moment * 10 + number, "progress": float(moment)})
    series[1].set_summary({"slowest": "plan"})
    assert client.flush()
    assert service.service.finish(60.0, 0).complete
    (run,) = read_runs(service.directory).values()
    rows = [{key for key in row if key[0] != "_"} for row in run.history]
    assert (
        rows
        == [
            {"xenna/t", "xenna/progress"},
            {"xenna/two_2/t", "xenna/two_2/progress"},
        ]
        * 3
    )
    assert [row.get("xenna/two_2/t") for row in run.history[1::2]] == [1, 11, 21]
    assert run.metrics["xenna/*"].step_metric == "xenna/t"
    assert run.metrics["xenna/two_2/progress"].step_metric == "xenna/two_2/t"
    assert run.summary["xenna/two_2/slowest"] == "plan"


def test_a_provisional_run_takes_rows_at_once(service: LocalService) -> None:
    """Rows before start() wait in the ledger, and belong to the run that it opens."""
    service.up(provisional_wait_s=3600.0)
    client = service.client("s")
    client.log({"x": 1})
    assert client.flush()
    assert service.status().run.provisional
    assert service.status().sink.state == "waiting"
    info, joined = service.start(project="late")
    assert (info.project, info.id, info.provisional, joined) == ("late", "run00001", False, False)
    assert service.service.finish(60.0, 0).delivered_rows == 1
    assert history(service)[0]["s/x"] == 1


def test_nobody_starts_it(service: LocalService) -> None:
    """Without a start() the run opens with the defaults after a short while."""
    service.up(provisional_wait_s=0.2)
    client = service.client("s")
    client.log({"x": 1})
    status = service.wait_for(lambda status: status.sink.applied_rows == 1)
    assert status.run.provisional
    assert status.run.project == "raywb"


def test_two_runs_one_after_the_other(service: LocalService) -> None:
    """Rows after finish() wait, are counted, and belong to the next run."""
    service.up()
    first, _ = service.start()
    client = service.client("s")
    client.log({"x": 1}, step=1)
    assert client.flush()
    assert service.service.finish(60.0, 0).received_rows == 1
    client.log({"x": 2}, step=2)
    assert client.flush()
    status = service.status()
    assert status.finished
    assert status.after_finish_rows == 1
    second, _ = service.start(project="second")
    assert second.id != first.id
    assert (second.epoch, second.project) == (2, "second")
    report = service.service.finish(60.0, 0)
    assert (report.received_rows, report.delivered_rows) == (1, 1)
    runs = read_runs(service.directory)
    assert [row["s/x"] for row in runs[first.id].history] == [1]
    assert [row["s/x"] for row in runs[second.id].history] == [2]
    assert runs[second.id].metrics["s/*"].step_metric == "s/step"


def test_conflicting_settings_are_named(service: LocalService) -> None:
    """A second start() with other settings says which and what; with the same it joins."""
    service.up()
    service.start(project="one")
    assert service.start(project="one")[1]
    assert service.start()[1]
    with pytest.raises(SettingsConflict, match=r"project is 'one', not 'two'.*raywb finish"):
        service.start(project="two")
    with pytest.raises(SettingsConflict, match="dir="):
        service.start(dir="/elsewhere")


def test_disabled_keeps_rows_to_itself(service: LocalService) -> None:
    """In mode disabled rows are taken and counted, and W&B is never started."""
    service.up()
    service.start(mode="disabled")
    client = service.client("s")
    client.log({"x": 1})
    assert client.flush()
    report = service.service.finish(10.0, 0)
    assert (report.received_rows, report.undelivered_rows, report.complete) == (1, 0, True)
    assert service.status().sink.state == "disabled"
    assert not (service.directory / "wandb").exists()


def test_an_unreachable_server_blocks_nobody(service: LocalService) -> None:
    """Online with a dead server: start, log and flush work, the backlog is on disk, finish ends."""
    service.up(sink_deadline_s=3.0)
    info, _ = service.start(
        mode="online",
        base_url="http://127.0.0.1:9",
        sink_deadline_s=3.0,
        api_key_file=_key(service),
    )
    assert info.mode == "online"
    client = service.client("s")
    client.log({"x": 1})
    assert client.flush()
    report = service.service.finish(5.0, 0)
    assert (report.received_rows, report.delivered_rows, report.undelivered_rows) == (1, 0, 1)
    assert not report.complete
    assert str(service.directory) in report.message
    status = service.wait_for(lambda status: status.sink.restarts > 0)
    assert status.sink.last_error


def online(service: LocalService, server: WandbServer, **settings: Any) -> dict[str, Any]:
    return {
        "mode": "online",
        "base_url": server.url,
        "api_key_file": _key(service),
        "project": "demo",
        **settings,
    }


def test_an_online_run_survives_its_service(service: LocalService) -> None:
    """Online, a service that dies resumes behind the server's last row, and all rows are there."""
    with WandbServer() as server:
        service.up()
        service.start(**online(service, server))
        client = service.client("s")
        logged = 0
        for _ in range(3):
            for _ in range(100):
                client.log({"x": logged}, step=logged)
                logged += 1
            assert client.flush(20.0)
            service.wait_for(lambda status: status.backlog_rows == 0)
            service.down()
            service.up()
        report = service.service.finish(90.0, 0)
        assert (report.complete, report.delivered_rows) == (True, logged), report
        (run,) = server.runs.values()
        assert [row["s/x"] for row in run.history] == list(range(logged))
        assert run.steps == list(range(logged))
        assert (run.state, run.group, run.job_type) == ("finished", "group", "orchestrator")
        assert run.summary["s/x"] == logged - 1
        assert service.status().run.url.startswith(server.url)


def test_delivered_is_what_the_server_says(service: LocalService) -> None:
    """A file stream refused with 403 loses nothing: finish asks the server, and sends again."""
    with WandbServer() as server:
        service.up()
        service.start(**online(service, server))
        client = service.client("s")
        client.log({"x": 0})
        assert client.flush()
        service.wait_for(lambda status: status.sink.applied_rows == 1)
        server.misbehave("file_stream", status=403, times=1)
        for number in range(1, 50):
            client.log({"x": number})
        assert client.flush()
        report = service.service.finish(120.0, 1)
        assert (report.complete, report.delivered_rows) == (True, 50), report
        (run,) = server.runs.values()
        assert [row["s/x"] for row in run.history] == list(range(50))
        assert run.state == "failed"
        assert service.status().sink.restarts >= 1


def _key(service: LocalService) -> str:
    path = service.directory.parent / "key"
    path.write_text("0" * 40)
    return str(path)


def test_no_key_on_disk(service: LocalService) -> None:
    """W&B's key is in none of the service's files."""
    service.up(sink_deadline_s=2.0)
    service.start(mode="online", base_url="http://127.0.0.1:9", api_key_file=_key(service))
    service.client("s").log({"x": 1})
    service.wait_for(lambda status: status.outbox_rows == 1)
    for path in service.directory.rglob("*"):
        assert not path.is_file() or b"0" * 40 not in path.read_bytes(), path
    assert (service.directory / "service.json").stat().st_mode & 0o077 == 0


def test_refusals_reach_the_run(service: LocalService, caplog: pytest.LogCaptureFixture) -> None:
    """What log() refuses is left out, warned about once per key, counted, and in the run."""
    service.up()
    service.start()
    client = service.client("s")
    with caplog.at_level(logging.WARNING, "raywb"):
        for _ in range(3):
            client.log({"fine": 1, "bad": [1, 2], "worse": {"x": object()}})
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert "'bad' is list" in warnings[0]
    assert "'worse/x' is object" in warnings[1]
    assert client.stats.rejected == 6
    assert client.flush()
    report = service.service.finish(60.0, 0)
    assert report.rejected == 6
    assert (report.received_rows, report.delivered_rows) == (3, 3)
    (run,) = read_runs(service.directory).values()
    assert [row.get("s/fine") for row in run.history[:3]] == [1, 1, 1]
    assert run.history[-1]["raywb/rejected"] == run.summary["raywb/rejected"] == 6


def request(
    service: LocalService, path: str, body: bytes = b"", **headers: str
) -> tuple[int, bytes]:
    endpoint = service.endpoint
    connection = http.client.HTTPConnection(*endpoint.address.split(":"), timeout=20)
    known = {
        "Authorization": f"Bearer {endpoint.token}",
        "X-Raywb-Cluster": CLUSTER.cluster_id,
        "X-Raywb-Protocol": str(PROTOCOL),
    }
    known |= {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request("POST", path, body=body, headers=known)
    response = connection.getresponse()
    return response.status, response.read()


GOOD = f"/v1/frames?source={'a' * 32}&offset=0"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (GOOD, {"Authorization": "Bearer wrong"}, 401),
        (GOOD, {"Authorization": ""}, 401),
        (GOOD, {"X_Raywb_Cluster": "another"}, 403),
        (GOOD, {"X_Raywb_Protocol": "999"}, 426),
        ("/v1/frames?source=../../etc/passwd&offset=0", {}, 400),
        (f"/v1/frames?source={'A' * 32}&offset=0", {}, 400),
        (f"/v1/frames?source={'a' * 32}&offset=-1", {}, 400),
        (f"/v1/frames?source={'a' * 32}&offset={10**30}", {}, 400),
        (f"/v1/frames?source={'a' * 32}", {}, 400),
        ("/v1/other", {}, 404),
        (GOOD, {}, 200),
    ],
)
def test_strangers_are_refused(
    service: LocalService, path: str, headers: dict[str, str], status: int
) -> None:
    """Wrong tokens, clusters, protocols and names are refused, and leave nothing behind."""
    service.up()
    body = frame(encode(Row(0, 1.0, None, {"x": 1})))
    before = {path for path in service.directory.parent.rglob("*") if path.is_file()}
    assert request(service, path, body, **headers)[0] == status
    ledger = service.directory / "ledger" / f"{0:020d}.log"
    assert (ledger.stat().st_size > 0) == (status == 200)
    after = {path for path in service.directory.parent.rglob("*") if path.is_file()}
    assert after == before
    if status in (400, 401, 403, 426):
        assert any("refused" in problem for problem in service.status().problems)


def test_the_fsync_of_a_start_counts(service: LocalService) -> None:
    """A start() sets how a service that an attach() made syncs, also after a restart."""
    service.up(fsync="every_second", provisional_wait_s=3600.0)
    body = frame(encode(Row(0, 1.0, None, {"x": 1})))
    ends = []
    for number in range(3):
        path = f"/v1/frames?source={'a' * 32}&offset={number * len(body)}"
        answer = json.loads(request(service, path, body)[1])
        ends.append((answer["end"] // len(body), answer["durable"] // len(body)))
        if number == 0:
            service.start(fsync="each")
        else:
            service.down()
            service.up(fsync="every_second")
    # Only the first request was answered before its bytes were on the disk itself.
    assert ends == [(1, 0), (2, 2), (3, 3)]


def test_a_huge_request_is_refused(service: LocalService) -> None:
    """A body above the limit is refused with 413."""
    service.up()
    try:
        status, _ = request(service, GOOD, b"x" * (9 * 1024 * 1024))
    except (ConnectionError, http.client.HTTPException):
        status = 413  # the service hung up before the whole body was sent
    assert status == 413
    assert service.status().received_rows == 0


def test_a_dead_process_is_swept(service: LocalService) -> None:
    """The journal of a forked child that was killed is brought home and removed."""
    service.up()
    service.start()
    client = service.client("s")
    client.log({"x": 0})
    pid = os.fork()
    if pid == 0:
        client._connection.after_fork_in_child()
        shutil.rmtree("/nonexistent", ignore_errors=True)
        client.log({"x": 1})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert client.flush()
    # Its neighbour, our own process, may be about to do the same.
    until("the dead process's journal to be gone", lambda: service.sweep().journals == 1)
    assert service.service.finish(60.0, 0).received_rows == 2
    assert sorted(row["s/x"] for row in history(service)) == [0, 1]


def test_a_bad_directory_is_a_problem_not_an_end(tmp_path: Path, service: LocalService) -> None:
    """A service that cannot work in its directory says so, tries again, and then comes up."""
    service.directory.parent.mkdir(exist_ok=True)
    service.directory.write_text("in the way")
    with pytest.raises(AssertionError):
        service.up(join_s=0.1)
    assert service.service.join(PROTOCOL, 0.1)["address"] is None
    service.directory.unlink()
    assert service.service.join(PROTOCOL, 20.0)["address"]


def test_state_is_whole_and_private(service: LocalService) -> None:
    """service.json holds the runs, is replaced whole, and can be read by its owner only."""
    service.up()
    service.start(project="p")
    state = load_state(service.directory)
    assert state is not None
    assert [run.info.project for run in state.runs] == ["p"]
    assert Settings(**state.runs[0].settings).project == "p"
    assert service.directory.stat().st_mode & 0o077 == 0


def test_no_row_stops_the_service_or_its_status(service: LocalService) -> None:
    """Keys in changing combinations and odd numbers: rows once, a status, a finish, a restart."""
    service.up()
    service.start(project="demo", mode="disabled")
    rows = [{"a/x": 1}, {"b/c/y": 1}, {"a/x": 2, "b/z": 3}, {"a/loss": 1.0}, {"a/x": 7, "b/z": 3}]
    client, odd = service.client(), service.client("train")
    for sent, row in enumerate(rows, start=1):
        client.log(row)
        client.flush(5)
        # The service merges in steps: the fault needs one for each of these rows.
        status = service.wait_for(lambda status, sent=sent: status.outbox_rows == sent)
    assert status.received_rows == len(rows)
    odd.log({"loss": 1.0, "ranks": math.nan, "slowest_rank": math.inf}, step=1)
    odd.flush(5)
    status = service.wait_for(lambda status: status.outbox_rows >= len(rows) + 1)
    assert status.outbox_rows == len(rows) + 1
    stages = {stage.stage: stage.metrics for stage in status.live.stages}
    assert stages == {"a": {"x": 7, "loss": 1.0}, "b": {"c/y": 1, "z": 3}, "train": {"loss": 1.0}}
    assert status.warnings == status.problems == []
    service.down()
    service.up()
    assert service.status().outbox_rows == len(rows) + 1
    assert service.service is not None
    assert service.service.finish(20.0, 0).state != "failed"


def test_what_the_views_leave_out_is_a_warning(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages beyond the limit, and rows that a view fails at, are told in the status."""
    monkeypatch.setattr(live_rows, "MAX_STAGES", 2)
    service.up()
    service.start(project="demo", mode="disabled")
    client = service.client()
    for n in range(4):
        client.log({f"w{n}/loss": 1.0})
    status = service.wait_for(lambda status: status.outbox_rows == 4)
    [warning] = status.warnings
    assert "2 stages" in warning

    def fail(*_: object) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(live_stage.LiveStage, "describe", fail)
    status = service.status()
    assert status.live.stages == []
    assert "odd" in status.warnings[-1]
