"""Runs that stages have of their own, beside the cluster's; without Ray."""

from __future__ import annotations

import errno
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from local_service import CLUSTER, LocalService, local_service
from rich.console import Console
from wandb_file import WandbRun, read_runs

from raywb.client import Client
from raywb.connection import Connection
from raywb.errors import SettingsConflict
from raywb.reports import FinishReport, RunInfo, StageRunRequest
from raywb.rows import Channel, Row, encode
from raywb.service import stages
from raywb.service.recover import recover
from raywb.service.stage_runs import FIRST_STAGE_RUN
from raywb.view.terminal import render_report, render_status


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as local:
        local.up()
        local.start()
        yield local


def ask(
    service: LocalService, stage: str, run_id: str | None = None, **explicit: Any
) -> tuple[RunInfo, int]:
    """Ask for a run as the actor is asked."""
    assert service.service is not None
    nonce = secrets.token_hex(8)
    request = StageRunRequest(stage=stage, run_id=run_id, explicit=explicit, nonce=nonce)
    return service.service.open_stage_run(request, None)


def attach(
    service: LocalService,
    stage: str,
    run_id: str | None = None,
    *,
    connection: Connection | None = None,
    ranks: tuple[int, int] | None = None,
    **explicit: Any,
) -> Client:
    """What ``attach(stage, own_run=True)`` does, in a process of its own if none is named."""
    assert service.service is not None
    run, session = ask(service, stage, run_id, **explicit)
    connection = connection or Connection(CLUSTER, service.endpoint, 1)
    service._connections.append(connection)
    channel = connection.open_channel(stage, *(ranks or (None, None)), own_run=(run.epoch, session))
    return Client(connection, channel, stage, run)


def finish(service: LocalService) -> FinishReport:
    assert service.service is not None
    return service.service.finish(60.0, 0)


def state_of(service: LocalService, run: RunInfo) -> str:
    (found,) = [one for one in service.status().stage_runs if one.run.id == run.id]
    return found.state


def wait_for_state(service: LocalService, run: RunInfo, *states: str) -> str:
    service.wait_for(lambda _: state_of(service, run) in states)
    return state_of(service, run)


def written(service: LocalService, run: RunInfo) -> WandbRun:
    return read_runs(service.directory)[run.id]


def test_stages_have_runs_of_their_own(service: LocalService) -> None:
    """One group, each with its job type, keys without a prefix, and each ended for itself."""
    cluster = service.client("all")
    cluster.log({"x": 0})
    good, bad = attach(service, "classify"), attach(service, "taxonomy")
    for step in range(50):
        good.log({"accuracy": step / 50}, step=step)
        bad.log({"accuracy": 1.0, "nested": {"y": step}})
    good.config.update({"model": "small"})
    bad.summary["best"] = 7
    good.log_table([{"a": 1}], "examples")
    good.close()
    bad.close(exit_code=3)
    assert wait_for_state(service, good.run, "finished") == "finished"
    assert wait_for_state(service, bad.run, "failed") == "failed"
    service.wait_for(lambda s: all(one.sink.state == "finished" for one in s.stage_runs))
    cluster.log({"x": 1})
    assert cluster.flush()
    report = finish(service)
    assert (report.complete, report.received_rows, report.delivered_rows) == (True, 2, 2)
    assert [(one.run.job_type, one.state, one.delivered_rows) for one in report.stage_runs] == [
        ("classify", "finished", 51),
        ("taxonomy", "failed", 50),
    ]
    run = written(service, good.run)
    assert run.values("accuracy") == [step / 50 for step in range(50)]
    assert run.values("step") == list(range(50))
    assert (run.group, run.job_type, run.config["model"]) == ("group", "classify", "small")
    assert run.name == good.run.name
    assert run.name.startswith("raywb-classify-20")
    other = written(service, bad.run)
    assert (other.values("nested/y"), other.exit_code, other.summary["best"]) == (
        list(range(50)),
        3,
        7,
    )
    assert read_runs(service.directory)["run00001"].values("all/x") == [0, 1]


def test_the_steps_of_a_run_of_ones_own_have_an_axis(service: LocalService) -> None:
    """The step is data, and the axis of each metric, as in the cluster's run."""
    client = attach(service, "decompose")
    for step in (30, 10, 20):
        client.log({"loss": step}, step=step)
    client.close()
    assert finish(service).complete
    run = written(service, client.run)
    assert (run.values("loss"), run.values("step")) == ([30, 10, 20], [30, 10, 20])
    assert run.metrics["loss"].step_metric == "step"


def test_ranks_meet_in_a_run_of_their_own(service: LocalService) -> None:
    """Processes that name one id share the run, which ends with the last of them."""
    one = attach(service, "train", "train-1", ranks=(0, 2))
    two = attach(service, "train", "train-1", ranks=(1, 2))
    for step in range(20):
        one.log({"loss": 1.0}, step=step)
        two.log({"loss": 3.0}, step=step)
    one.close()
    service.wait_for(lambda s: sum(source.received_rows for source in s.sources) == 40)
    assert state_of(service, two.run) == "running"
    two.log({"loss": 5.0}, step=20)
    two.close()
    assert wait_for_state(service, two.run, "finished") == "finished"
    report = finish(service)
    assert [stage.delivered_rows for stage in report.stage_runs] == [41]
    run = written(service, one.run)
    assert run.values("loss") == [2.0] * 20 + [5.0]
    assert run.values("ranks") == [2] * 20 + [1]


#: A process that attaches to a run of its own, logs 100 rows, and ends as it is told.
STAGE = """
import os, signal, sys
import msgspec
from local_service import CLUSTER
from raywb.client import Client
from raywb.this_process import connection_for
from raywb.reports import RunInfo
from raywb.shipping import Endpoint

endpoint = msgspec.json.decode(sys.argv[1], type=Endpoint)
run = msgspec.json.decode(sys.argv[2], type=RunInfo)
connection = connection_for(CLUSTER, endpoint, 1)
channel = connection.open_channel("s", None, None, own_run=(run.epoch, int(sys.argv[3])))
client = Client(connection, channel, "s", run)
for number in range(100):
    client.log({"x": number})
how = sys.argv[4]
if how == "raise":
    raise RuntimeError("as the test asked")
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "fork":
    if os.fork() == 0:
        client.log({"x": 100})
        client.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
if how == "block":
    with client:
        raise SystemExit(0)
"""


def run_stage(service: LocalService, how: str, run_id: str | None = None) -> RunInfo:
    """A stage's whole process; what it asks of the actor is asked here, as there is no Ray."""
    assert service.service is not None
    run, session = ask(service, "s", run_id)
    texts = [msgspec.json.encode(value).decode() for value in (service.endpoint, run)]
    subprocess.run(
        [sys.executable, "-c", STAGE, *texts, str(session), how],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    return run


@pytest.mark.parametrize(
    ("how", "state", "exit_code", "rows"),
    [
        ("end", "finished", 0, 100),
        ("raise", "failed", 1, 100),
        ("kill", "crashed", None, 100),
        ("fork", "finished", 0, 101),
        ("block", "failed", 1, 100),
    ],
)
def test_the_end_of_a_stages_process_is_its_runs(
    service: LocalService, how: str, state: str, exit_code: int | None, rows: int
) -> None:
    """A good end, an exception, a SIGKILL; a forked child's death says nothing of the run."""
    go_on = attach(service, "other")
    run = run_stage(service, how)
    if how in ("kill", "fork"):
        service.sweep()
    assert wait_for_state(service, run, "finished", "failed", "crashed") == state
    assert state_of(service, go_on.run) == "running"
    go_on.log({"y": 1})
    go_on.close()
    report = finish(service)
    assert report.complete, report
    found = written(service, run)
    assert sorted(found.values("x")) == list(range(rows))
    assert found.exit_code == exit_code
    assert written(service, go_on.run).values("y") == [1]


def test_a_run_of_ones_own_survives_the_service(service: LocalService) -> None:
    """Another incarnation goes on with every run, each row once; what ended stays ended."""
    done, open_ = attach(service, "done"), attach(service, "open", "open-1")
    done.log({"x": 1})
    done.close()
    wait_for_state(service, done.run, "finished")
    for number in range(100):
        open_.log({"x": number})
    assert open_.flush()
    service.down()
    for number in range(100, 200):
        open_.log({"x": number})
    service.up()
    service.start()
    for number in range(200, 300):
        open_.log({"x": number})
    open_._connection.use(service.endpoint, 1)
    open_.close()
    assert wait_for_state(service, open_.run, "finished") == "finished"
    report = finish(service)
    assert report.complete, report
    assert [one.received_rows for one in report.stage_runs] == [1, 300]
    assert written(service, open_.run).values("x") == list(range(300))
    assert written(service, done.run).values("x") == [1]


def test_a_run_that_has_ended_is_opened_again(service: LocalService) -> None:
    """A stage that crashed and is started again under the same id goes on in its run."""
    run = run_stage(service, "kill", "again")
    service.sweep()
    assert wait_for_state(service, run, "crashed") == "crashed"
    client = attach(service, "s", "again")
    assert wait_for_state(service, client.run, "running") == "running"
    client.log({"x": 100})
    client.close()
    assert wait_for_state(service, client.run, "finished") == "finished"
    report = finish(service)
    assert report.complete, report
    found = written(service, run)
    assert (found.values("x"), found.exit_code) == (list(range(101)), 0)


def test_finish_ends_the_runs_that_are_open(service: LocalService) -> None:
    """Nothing stays open behind a finish; what is logged later still reaches its run."""
    client = attach(service, "s")
    client.log({"x": 1})
    assert client.flush()
    report = finish(service)
    assert [(one.state, one.delivered_rows) for one in report.stage_runs] == [("finished", 1)]
    assert report.complete


def test_a_run_is_opened_again_faster_than_it_ends(service: LocalService) -> None:
    """One process at a time writes a run, however often its stage begins and ends."""
    for number in range(12):
        client = attach(service, "s", "loop")
        client.log({"x": number})
        client.close()
        service.wait_for(lambda status, n=number: status.stage_runs[0].received_rows == n + 1)
    service.wait_for(lambda status: status.stage_runs[0].state == "finished")
    report = finish(service)
    assert report.complete, report
    found = written(service, client.run)
    assert (found.values("x"), found.steps) == (list(range(12)), list(range(12)))
    assert service.status().stage_runs[0].sink.restarts == 0


def test_what_is_known_of_writers_counts_at_a_finish(service: LocalService) -> None:
    """One writer has failed, another is still there: the run is failed, not finished."""
    good, bad = attach(service, "s", "two"), attach(service, "s", "two")
    good.log({"x": 1})
    bad.log({"x": 2})
    bad.close(exit_code=3)
    assert good.flush()
    (stage,) = finish(service).stage_runs
    assert (stage.state, stage.exit_code, stage.delivered_rows) == ("failed", 3, 2)


def test_a_full_disk_does_not_keep_a_run_open(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end could not be written down: it is tried again, though nothing else happens."""
    client = attach(service, "s")
    client.log({"x": 1})
    whole, failures = stages.save_state, iter([OSError(errno.ENOSPC, "full")] * 3)

    def save_state(*arguments: Any) -> None:
        for error in failures:
            raise error
        whole(*arguments)

    monkeypatch.setattr(stages, "save_state", save_state)
    client.close()
    assert wait_for_state(service, client.run, "finished") == "finished"
    assert next(failures, None) is None
    assert finish(service).complete


def test_how_ranks_become_one_is_the_runs_own(service: LocalService) -> None:
    """A definition of a stage's run holds after a restart, and for no other run."""
    one, two = (attach(service, "train", "t", ranks=(rank, 2)) for rank in (0, 1))
    others = [service.client("train", rank=rank, world_size=2) for rank in (0, 1)]
    one.define_metric("loss", across_ranks="max")
    assert one.flush()
    service.down()
    service.up()
    service.start()
    for client in (one, two, *others):
        client._connection.use(service.endpoint, 1)
    for first, second in ((one, two), others):
        first.log({"loss": 1.0}, step=1)
        second.log({"loss": 3.0}, step=1)
    for client in (one, two, *others):
        client.close()
    assert finish(service).complete
    assert written(service, one.run).values("loss") == [3.0]
    assert read_runs(service.directory)["run00001"].values("train/loss") == [2.0]


def test_a_disabled_run_is_ended_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With W&B disabled nothing is delivered, and nothing is written down again and again."""
    with local_service(tmp_path) as service:
        service.up()
        service.start(mode="disabled")
        client = attach(service, "s")
        client.log({"x": 1})
        client.close()
        assert wait_for_state(service, client.run, "finished") == "finished"
        monkeypatch.delattr(stages, "save_state")
        busy = service.client("all")
        for number in range(5):
            busy.log({"x": number})
            assert busy.flush()
        service.wait_for(lambda status: status.received_rows == 5)
        assert service.status().problems == []


def test_a_call_that_is_made_again_opens_nothing(service: LocalService) -> None:
    """The actor died before its answer: Ray's caller asks again, and gets the same."""
    assert service.service is not None
    request = StageRunRequest(stage="s", run_id=None, explicit={}, nonce="n")
    first, again = (service.service.open_stage_run(request, None) for _ in range(2))
    assert first == again
    assert len(service.status().stage_runs) == 1


def test_a_finished_run_takes_no_stages(service: LocalService) -> None:
    """What came behind a finish would wait for a start() that nobody may call."""
    assert finish(service).complete
    with pytest.raises(SettingsConflict, match="is finished"):
        ask(service, "s")
    service.start()
    client = attach(service, "s")
    client.log({"x": 1})
    client.close()
    report = finish(service)
    assert [one.delivered_rows for one in report.stage_runs] == [1]


def test_a_run_opened_again_belongs_to_the_present_one(service: LocalService) -> None:
    """finish() waits for all that was opened since start(), also under an id of before."""
    client = attach(service, "s", "again")
    client.log({"x": 1})
    client.close()
    assert [one.delivered_rows for one in finish(service).stage_runs] == [1]
    service.start()
    client = attach(service, "s", "again")
    client.log({"x": 2})
    assert client.flush()
    report = finish(service)
    assert [one.delivered_rows for one in report.stage_runs] == [2]
    assert written(service, client.run).values("x") == [1, 2]


def test_another_project_is_another_run(service: LocalService) -> None:
    """Who names a run's id and another project is told, as is a start() with a stage's id."""
    attach(service, "s", "mine")
    with pytest.raises(SettingsConflict, match="project is 'raywb', not 'other'"):
        ask(service, "s", "mine", project="other")
    assert finish(service).complete
    with pytest.raises(SettingsConflict, match="mine"):
        service.start(run_id="mine")


def test_the_id_of_the_clusters_run_is_refused(service: LocalService) -> None:
    """Two runs with one id would be one at W&B's."""
    assert service.service is not None
    with pytest.raises(SettingsConflict, match="run00001"):
        ask(service, "s", "run00001")


def test_a_person_sees_the_runs_of_stages(service: LocalService) -> None:
    """The status and the report name each, with its state and its rows."""
    client = attach(service, "s", "mine")
    client.log({"x": 1})
    assert client.flush()
    service.wait_for(lambda status: status.stage_runs[0].received_rows == 1)
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render_status(service.status()))
    assert re.search(rf"{client.run.name} \(mine\) +running +1 ", shown.get())
    with console.capture() as shown:
        console.print(render_report(finish(service)))
    words = " ".join(shown.get().split())
    assert f"{client.run.name} (mine): finished, 1 rows received, 1 with W&B" in words


def test_a_stage_may_have_settings_of_its_own(service: LocalService) -> None:
    """Project and group can be named; the rest is the cluster's."""
    client = attach(service, "monitor", project="elsewhere", group="mine")
    assert (client.run.project, client.run.group) == ("elsewhere", "mine")
    assert client.run.job_type == "orchestrator"
    assert client.run.name.startswith("elsewhere-monitor-20")


def test_rows_for_a_run_that_does_not_exist_stay_in_the_clusters(service: LocalService) -> None:
    """A client that names any number writes into no run but the cluster's."""
    connection = Connection(CLUSTER, service.endpoint, 1)
    service._connections.append(connection)
    connection._say(Channel(0, "s", None, None, run=FIRST_STAGE_RUN + 7, session=1))
    connection.append(encode(Row(0, 1.0, None, {"x": 1})))
    assert connection.flush(20.0)
    assert finish(service).received_rows == 1
    assert read_runs(service.directory)["run00001"].values("x") == [1]


def test_what_a_dead_cluster_left_of_a_stages_run_is_recovered(service: LocalService) -> None:
    """``raywb recover`` brings every run of the directory to its end."""
    client = attach(service, "s")
    client.log({"x": 1})
    assert client.flush()
    service.down()
    client._connection.close(0.1)
    report = recover(service.directory, timeout_s=60.0, tell=lambda _: None)
    assert report.complete, report
    assert {one.run.id: one.delivered_rows for one in report.runs}[client.run.id] == 1
    assert written(service, client.run).values("x") == [1]
