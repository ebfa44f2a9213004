"""`raywb shutdown`: the real Vast client, a real cluster, and what is decided in every case."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from left_behind import LeftBehind
from local_service import local_service
from moto.server import ThreadedMotoServer
from online_service import set_environment
from ray_cluster import RayCluster, clean_environment, until
from vast_server import VastInstance, VastServer
from wandb_client import API_KEY
from wandb_server import WandbServer

from raywb.errors import NoClusterError, SettingsError
from raywb.launch import delivered
from raywb.launch.connecting import clusters_of, connect_if_alive
from raywb.launch.delivered import Delivery, deliver
from raywb.launch.finishing import Finished
from raywb.launch.outputs import upload_outputs
from raywb.launch.places import EndFailed
from raywb.launch.places.choice import choose_place
from raywb.launch.places.plain_command import PlainCommand
from raywb.launch.places.vast_instance import VastInstance as VastPlace
from raywb.launch.shutdown import outcomes
from raywb.launch.shutdown.outcomes import Asked, before_grace

if not os.environ.get("CI"):
    pytest.importorskip("vastai", reason="vastai is not installed")


@pytest.fixture(scope="module")
def gone_address() -> str:
    """Where a head once was, so that no other cluster of this machine is found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def alone(tmp_path: Path, gone_address: str) -> dict[str, str]:
    """The environment of a machine on which nothing runs."""
    return clean_environment(tmp_path) | {"RAY_ADDRESS": gone_address}


def on(instance: VastInstance, vast: VastServer) -> dict[str, str]:
    return instance.environment | {"VAST_URL": vast.url}


def shutdown(environment: Mapping[str, str], *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "raywb", "shutdown", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=100)
    print(said)
    return process.returncode, said


# -- decisions -------------------------------------------------------------------------------------

CASES: list[tuple[dict[str, Any], int]] = [
    ({"unanswered": "no answer"}, outcomes.EXIT_UNANSWERED),
    ({"rows": ("3 rows",)}, outcomes.EXIT_ROWS),
    ({"uploads": ("a table",)}, outcomes.EXIT_UPLOAD),
    ({"offline": ("offline",)}, outcomes.EXIT_OFFLINE),
]


@pytest.mark.parametrize(("lacking", "code"), CASES)
def test_what_is_undelivered_keeps_it(lacking: dict[str, Any], code: int) -> None:
    """Each kind has its own exit code and says itself; --even-if-undelivered ends it all the
    same, and a job that failed stays where that was asked for, whatever else is the matter."""
    delivery = Delivery(**lacking)
    (texts,) = lacking.values()
    decision = before_grace("it", delivery, Asked(), keeps_disk=False)
    assert (decision.ends, decision.exit_code) == (False, code)
    assert (texts if isinstance(texts, str) else texts[0]) in decision.lines[0]
    forced = before_grace("it", delivery, Asked(even_if_undelivered=True), keeps_disk=False)
    assert forced.ends
    assert forced.lines[-1] == "Training complete - auto-shutdown in 10 seconds..."
    asked = Asked(job_exit_code=3, keep_on_failure=True, even_if_undelivered=True)
    kept = before_grace("it", delivery, asked, keeps_disk=False)
    assert (kept.ends, kept.exit_code) == (False, 0)


def test_files_that_outlive_the_place_are_no_reason_to_stay() -> None:
    """Offline runs and outputs keep a machine that takes its disk along, and no other one."""
    delivery = Delivery(offline=("offline",))
    for keeps_disk, outputs in itertools.product((True, False), ((), ("files",))):
        decision = before_grace("it", delivery, Asked(), keeps_disk=keeps_disk, outputs=outputs)
        assert decision.ends is keeps_disk
    outputs_only = before_grace("it", Delivery(), Asked(), keeps_disk=False, outputs=("files",))
    assert (outputs_only.ends, outputs_only.exit_code) == (False, outcomes.EXIT_OUTPUTS)


def test_a_failed_job_ends_its_place_too() -> None:
    """Without --keep-on-failure a failure ends it, and the line says that it failed."""
    decision = before_grace("it", Delivery(), Asked(1.0, job_exit_code=3), keeps_disk=False)
    assert decision.ends
    assert decision.lines == ("Training failed (exit code 3) - auto-shutdown in 1 second...",)


def test_the_page_has_every_exit_code() -> None:
    """The table of raywb/launch/README.md has each exit code of the command, and no other."""
    page = (Path(outcomes.__file__).parents[1] / "README.md").read_text()
    table = page.partition("### Outcomes")[2].partition("\n###")[0]
    cells = [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| ")]
    codes = {int(cell) for cell in cells if cell.isdigit()}
    assert codes == set(outcomes.EXIT_CODES)


def test_the_first_place_that_the_environment_names() -> None:
    """A command of one's own, else Vast, else Slurm; a number that is none is refused."""
    both = {"CONTAINER_ID": "7", "SLURM_JOB_ID": "8"}
    found = [choose_place("auto", None, both), choose_place("slurm", None, both)]
    found += [choose_place("auto", None, {"SLURM_JOB_ID": "8"}), choose_place("auto", "true", both)]
    names = [one if isinstance(one, str) else one.name for one in found]
    assert names == ["vast", "slurm", "slurm", "command"]
    assert choose_place("auto", None, {}) == "CONTAINER_ID not set - cannot auto-shutdown"
    assert choose_place("slurm", None, {}) == "SLURM_JOB_ID not set - cannot auto-shutdown"
    with pytest.raises(SettingsError):
        choose_place("command", None, {})
    with pytest.raises(EndFailed):
        choose_place("vast", None, {"CONTAINER_ID": "../8"})


def test_a_shell_over_ssh_knows_its_instance(tmp_path: Path) -> None:
    """The number and the key are in the first process's environment only."""
    (tmp_path / "environ").write_bytes(b"A=b\0CONTAINER_ID=7\0CONTAINER_API_KEY=k=1\0")
    place = choose_place("auto", None, {}, tmp_path / "environ")
    assert isinstance(place, VastPlace)
    assert (place.what, place._key) == ("Vast.ai instance 7", "k=1")
    other = choose_place("auto", None, {"CONTAINER_ID": "8"}, tmp_path / "environ")
    assert isinstance(other, VastPlace)
    assert (other.what, other._key) == ("Vast.ai instance 8", None)


@pytest.mark.parametrize("state", ["NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"])
def test_slurm_says_in_many_words_that_a_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Each of the states in which a job has ended confirms the end."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho {state}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    place = choose_place("slurm", None, {"SLURM_JOB_ID": "7"})
    assert not isinstance(place, str)
    assert place.has_ended(0.0)


def test_a_command_that_hangs_is_cut_off() -> None:
    """With all that it has started, and it counts as refused."""
    began = time.monotonic()
    with pytest.raises(EndFailed, match="took longer than"):
        PlainCommand("sleep 77.3 & sleep 77.3", timeout_s=0.2).end()
    assert time.monotonic() - began < 10


# -- Vast.ai ---------------------------------------------------------------------------------------


def test_the_instance_is_destroyed_after_the_grace_time(
    vast: VastServer, alone: dict[str, str]
) -> None:
    """With nothing to deliver: the line of the contract, the grace time, one destroy with the
    instance's own key, and success when Vast shows it gone; the key is in no argument."""
    instance, other = vast.launch(), vast.launch()
    vast.lingers = 1
    process = shutdown(alone | on(instance, vast), "--grace-s=1.5")
    assert process.stdout is not None
    said = ""
    while "auto-shutdown in 1.5 seconds" not in said:
        said += process.stdout.readline()
    began = time.monotonic()
    command_line = Path(f"/proc/{process.pid}/cmdline").read_text()
    code, rest = ended(process)
    assert time.monotonic() - began > 1.4
    assert "[raywb] Training complete - auto-shutdown in 1.5 seconds..." in said
    assert (code, vast.destroyed) == (0, [instance.id])
    (destroy,) = vast.of_kind("destroy")
    assert destroy.key == instance.key
    assert instance.key not in command_line + said + rest
    assert f"✓ Vast.ai instance {instance.id} is gone" in rest
    assert list(vast.instances) == [other.id]


def test_without_an_instance_nothing_is_done(vast: VastServer, alone: dict[str, str]) -> None:
    """No CONTAINER_ID: a warning, no failure, no request."""
    code, said = ended(shutdown(alone | {"VAST_URL": vast.url}))
    assert (code, vast.requests) == (0, [])
    assert "CONTAINER_ID not set - cannot auto-shutdown" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_in_the_grace_time(
    vast: VastServer, alone: dict[str, str], number: signal.Signals
) -> None:
    """A signal in the grace time: nothing is asked of Vast, and it says that the instance stays."""
    instance = vast.launch()
    process = shutdown(alone | on(instance, vast), "--grace-s=60")
    assert process.stdout is not None
    while "auto-shutdown in 60 seconds" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    code, said = ended(process)
    assert (code, vast.requests) == (128 + number, [])
    assert f"Vast.ai instance {instance.id} stays" in said


@pytest.mark.parametrize("fault", [401, 404, 500, "refuse", "nonsense", "hang up"])
def test_a_destroy_that_fails(vast: VastServer, fault: int | str) -> None:
    """Whatever goes wrong at Vast is no success, and the reason is told."""
    instance = vast.launch()
    vast.misbehave("destroy", fault)
    with pytest.raises(EndFailed, match=str(instance.id)):
        VastPlace(on(instance, vast)).end()
    assert vast.destroyed == []


def test_a_destroy_whose_answer_is_lost(vast: VastServer) -> None:
    """The instance was destroyed and the answer did not come: that is seen, and is a success."""
    instance = vast.launch()
    place = VastPlace(on(instance, vast))
    answer = vast._destroy

    def lose(request: Any, number: int) -> tuple[int, Any]:
        answer(request, number)
        return 500, {"msg": "lost"}

    vast._destroy = lose  # type: ignore[method-assign]
    assert "was lost" in place.end()
    assert place.has_ended(5.0)


def test_what_vast_does_not_show_gone_is_not_gone(vast: VastServer) -> None:
    """Accepted and still there; and a key that never opened it: neither confirms anything."""
    instance = vast.launch()
    vast.misbehave("destroy", "pretend")
    place = VastPlace(on(instance, vast))
    assert "accepted" in place.end()
    assert not place.has_ended(0.0)
    vast.misbehave("show", 403)
    place = VastPlace(on(instance, vast))
    place.end()
    assert not place.has_ended(0.0)
    vast.misbehave("show", None)
    other = {"CONTAINER_ID": "9", "CONTAINER_API_KEY": vast.api_key}
    with pytest.raises(EndFailed, match="knows no instance 9"):
        VastPlace(on(instance, vast) | other).end()


class Scripted:
    """A place that ends this process, or says that it does not end, as a test wants it."""

    name, what, keeps_disk = "scripted", "it", False

    def __init__(self, *, signal_when: str = "", gone: bool = True) -> None:
        self._signal_when = signal_when
        self._gone = gone

    def end(self) -> str:
        if self._signal_when == "end":
            os.kill(os.getpid(), signal.SIGTERM)
        return "accepted"

    def has_ended(self, timeout_s: float) -> bool:
        if self._signal_when == "has_ended":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return self._gone


@pytest.mark.parametrize(
    ("place", "code", "last"),
    [
        (Scripted(signal_when="end"), 0, "✓ it is ending, and this process with it"),
        (Scripted(signal_when="has_ended"), 0, "✓ it is ending, and this process with it"),
        (Scripted(gone=False), outcomes.EXIT_UNCONFIRMED, "! the end of it was accepted"),
        (Scripted(), 0, "✓ it is gone"),
        (PlainCommand("exit 3"), outcomes.EXIT_REFUSED, "`exit 3` ended with exit code 3"),
        (PlainCommand("true"), 0, "✓ what `true` ends is gone"),
    ],
)
def test_the_end_comes_while_it_is_asked_for(place: Any, code: int, last: str) -> None:
    """A machine that ends its own asker before he could look has ended: the order is said."""
    from raywb.launch.shutdown.ending import run_shutdown
    from raywb.launch.shutdown.signals import Signals

    said: list[str] = []
    with Signals() as signals:
        found = run_shutdown(
            place,
            Asked(grace_s=0.0),
            signals,
            deliver=Delivery,
            upload=lambda: ((), ()),
            say=said.append,
        )
    assert found == code
    assert any(line.startswith(last) or last in line for line in said[-2:]), said


@pytest.mark.parametrize("forced", [False, True])
def test_an_error_that_nobody_thought_of(*, forced: bool) -> None:
    """It keeps the place, is told, and gives way to --even-if-undelivered like all else."""
    from raywb.launch.shutdown.ending import run_shutdown
    from raywb.launch.shutdown.signals import Signals

    def fail() -> Any:
        raise OSError("no such luck")

    said: list[str] = []
    with Signals() as signals:
        found = run_shutdown(
            Scripted(),
            Asked(grace_s=0.0, even_if_undelivered=forced),
            signals,
            deliver=fail,
            upload=fail,
            say=said.append,
        )
    assert found == (0 if forced else outcomes.EXIT_UNANSWERED)
    assert sum("no such luck" in line for line in said) == 2


# -- delivery --------------------------------------------------------------------------------------


def test_outputs_are_off_the_machine_or_keep_it(tmp_path: Path) -> None:
    """Without an address they lie here only; with one each file is there, also behind links;
    again only what changed is sent, and a strange file of the same size is not taken for ours."""
    outputs, target = tmp_path / "out", tmp_path / "target"
    (outputs / "deep").mkdir(parents=True)
    (outputs / "a.bin").write_bytes(b"x" * 1000)
    (outputs / "deep" / "b.json").write_text("{}")
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "c").write_text("behind a link")
    (outputs / "link").symlink_to(tmp_path / "large")
    (outputs / "deep" / "round").symlink_to(outputs)
    assert upload_outputs(None, None) == ((), ())
    lonely, failed = upload_outputs(outputs, None)
    assert (len(lonely), failed) == (1, ())
    assert "3 files" in lonely[0]
    target.mkdir()
    (target / "a.bin").write_bytes(b"y" * 1000)

    def upload() -> object:
        return upload_outputs(outputs, f"file://{target}", local_is_elsewhere=True)

    assert upload() == ((), ())
    assert (target / "deep" / "b.json").read_text() == "{}"
    assert (target / "a.bin").read_bytes() == b"x" * 1000
    assert (target / "link" / "c").read_text() == "behind a link"
    untouched = (target / "a.bin").stat().st_mtime_ns
    (target / "deep" / "b.json").write_text("torn")
    (outputs / "link" / "c").write_text("BEHIND A LINK")
    assert upload() == ((), ())
    assert (target / "deep" / "b.json").read_text() == "{}"
    assert (target / "link" / "c").read_text() == "BEHIND A LINK"
    assert (target / "a.bin").stat().st_mtime_ns == untouched


def test_outputs_that_are_not_brought_off_are_said(tmp_path: Path) -> None:
    """A place that goes with this machine, one that is none, no time, and no such directory."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("a")
    for url, said in {
        "bucket/name": "a path of this machine",
        f"file://{tmp_path}/target": "a path of this machine",
        "memory://bucket": "memory",
        "nothing://bucket": "failed",
    }.items():
        lonely, (failed,) = upload_outputs(tmp_path / "out", url)
        assert (lonely, said in failed) == ((), True), failed
    _, (failed,) = upload_outputs(
        tmp_path / "out", f"file://{tmp_path}/out/a", local_is_elsewhere=True, timeout_s=20
    )
    assert "failed" in failed
    (lonely,), failed_uploads = upload_outputs(tmp_path / "typo", "s3://bucket")
    assert ("no directory" in lonely, failed_uploads) == (True, ())
    assert upload_outputs(tmp_path / "typo", None, may_be_missing=True) == ((), ())


def test_what_a_cluster_that_is_gone_left_is_delivered_first(
    vast: VastServer, alone: dict[str, str], tmp_path: Path
) -> None:
    """A service and a worker were killed: their rows are at W&B's server before the instance is
    destroyed; without a key it stays."""
    with WandbServer() as server, LeftBehind(tmp_path) as left:
        left.begin(mode="online", base_url=server.url, api_key=API_KEY)
        logged = left.kill()
        instance = vast.launch()
        environment = alone | left.environment | on(instance, vast)
        environment |= {"RAYWB_DIR": str(left.directory)}
        code, said = ended(shutdown(environment, "--grace-s=0"))
        assert (code, vast.destroyed) == (outcomes.EXIT_ROWS, [])
        assert "no W&B key is to be had here" in said
        code, said = ended(shutdown(environment | {"WANDB_API_KEY": API_KEY}, "--grace-s=0"))
        assert (code, vast.destroyed) == (0, [instance.id])
        assert "Bringing home what a cluster that is gone left" in said
        (run,) = server.runs.values()
        assert run.values("s/x")[:logged] == list(range(logged))


def test_what_came_after_the_end_of_a_run_is_missed(
    gone_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job logged on after somebody else's finish, and its cluster is gone: its rows, in the
    ledger and in journals, are said to be undelivered; also where the disk outlives the place,
    for journals do not. A directory of which nothing lies here is another machine's."""
    with LeftBehind(tmp_path) as left:
        left.begin(mode="offline")
        at_finish = left.finish(40)["received_rows"]
        until("rows after the end", lambda: left._output.read_bytes().count(b".") > at_finish + 300)
        logged = left.kill()
        environment = clean_environment(tmp_path) | left.environment
        home = tmp_path / "raywb" / "project" / "run"
        home.parent.mkdir(parents=True)
        left.directory.rename(home)
        monkeypatch.setenv("HOME", str(tmp_path))
        elsewhere = environment | {"RAYWB_JOURNAL_DIR": str(tmp_path / "none")}
        said = deliver(gone_address, elsewhere, print, timeout_s=20, disk_stays=True)
        assert said.is_complete
        said = deliver(gone_address, environment, print, timeout_s=20, disk_stays=True)
        assert not said.is_complete
        rows = int(said.rows[0].split()[0])
        assert rows >= logged - at_finish
        assert "came after the run was finished" in said.rows[0]
        # No journal is left now: the ledger alone tells.
        assert deliver(gone_address, environment, print, timeout_s=20).rows == said.rows


def test_an_earlier_run_of_a_live_service_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last run is complete, an earlier one has not come to W&B: its rows are missed, and it
    is waited for; when W&B has it nothing is missing."""
    set_environment(monkeypatch, tmp_path)
    with WandbServer() as server, local_service(tmp_path / "service") as service:
        service.up()
        server.misbehave(status=503)
        key = {"mode": "online", "base_url": server.url, "api_key": API_KEY}
        service.start(**key, project="one")
        client = service.client("s")
        client.log({"x": 1})
        assert client.flush()
        assert not service.service.finish(0.5, 0).complete
        service.start(mode="offline", project="two")
        client.log({"x": 2})
        assert client.flush()
        report = service.service.finish(40, 0)
        assert report.complete
        monkeypatch.setattr(delivered, "finish_cluster", lambda *_, **__: Finished(report))

        def look(timeout_s: float) -> Delivery:
            return deliver("auto", {}, print, timeout_s=timeout_s, here=False)

        (missing,) = look(0.5).rows
        assert "an earlier one" in missing
        server.behave()
        assert look(60).is_complete


def test_whatever_goes_wrong_is_no_delivery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody thought of, and one of the disk: unanswered, and rows; a cluster on
    which others log; a service that was stopped, whose directory only Ray's store knows."""

    def fail(*_: object, **__: object) -> Finished:
        raise KeyError("unforeseen")

    monkeypatch.setattr(delivered, "finish_cluster", fail)
    said = deliver("auto", {}, print, timeout_s=1, here=False)
    assert "unforeseen" in (said.unanswered or "")
    (tmp_path / "service.json").mkdir()
    monkeypatch.setattr(delivered, "finish_cluster", lambda *_, **__: Finished(stopped=tmp_path))
    said = deliver("auto", {}, print, timeout_s=1)
    assert "cannot be brought home" in said.rows[0]
    busy = Finished(still_logging=("job 3",))
    monkeypatch.setattr(delivered, "finish_cluster", lambda *_, **__: busy)
    assert deliver("auto", {}, print, timeout_s=1, here=False).rows == ("job 3",)
    code = before_grace("it", Delivery(rows=("job 3",)), Asked(), keeps_disk=True).exit_code
    assert code == outcomes.EXIT_ROWS


def test_which_cluster_is_meant(gone_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that was given comes before RAY_ADDRESS, which stands for `auto` only; of the
    clusters on this machine a user means his own."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for address, named in ((gone_address, gone_address), ("auto", "127.0.0.1:1")):
        with pytest.raises(NoClusterError, match=named):
            connect_if_alive(address, os.environ)
    raylet = ["raylet", "-c", "input()", "--gcs-address=127.0.0.1:2"]
    with subprocess.Popen(raylet, executable=sys.executable, stdin=subprocess.PIPE) as process:
        assert "127.0.0.1:2" in clusters_of(os.geteuid())
        assert "127.0.0.1:2" not in clusters_of(os.geteuid() + 1)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_something_hangs(number: signal.Signals) -> None:
    """A library that does not come back: a signal ends the command at once, with its code."""
    from raywb.launch.aside import aside
    from raywb.launch.shutdown.ending import run_shutdown
    from raywb.launch.shutdown.signals import Signals

    release = threading.Event()

    def hang() -> Delivery:
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        release.wait(30)
        return Delivery()

    began = time.monotonic()
    with Signals() as signals:
        code = run_shutdown(
            Scripted(),
            Asked(),
            signals,
            deliver=lambda: aside(hang),
            upload=lambda: ((), ()),
            say=print,
        )
    release.set()
    assert code == 128 + number
    assert time.monotonic() - began < 10


DRIVER = """
    import raywb
    raywb.start(project="shutdown", **{settings!r})
    client = raywb.attach("s")
    for number in range({rows}):
        client.log({{"x": number}}, step=number)
    client.flush()
"""


@pytest.mark.ray
def test_a_real_cluster_delivers_before_it_is_ended(vast: VastServer, tmp_path: Path) -> None:
    """W&B away: the instance stays, and says so. Back: every row is at the server when Vast is
    asked. An offline run: it stays, until it is asked for all the same."""
    with WandbServer() as server, RayCluster.start(num_cpus=2) as cluster:
        key = tmp_path / "key"
        key.write_text(API_KEY)
        online = {"mode": "online", "base_url": server.url, "api_key_file": str(key)}
        server.misbehave(status=503)
        cluster.run_driver(DRIVER.format(settings=online, rows=200))
        instance = vast.launch()
        environment = cluster.environment | on(instance, vast)
        code, said = ended(shutdown(environment, "--grace-s=0", "--timeout-s=2"))
        assert (code, vast.requests) == (outcomes.EXIT_ROWS, [])
        assert "200 rows are not with W&B yet" in said
        server.behave()
        at_server: list[list[Any]] = []
        destroy = vast._destroy

        def look_first(request: Any, number: int) -> tuple[int, Any]:
            at_server.extend(run.values("s/x") for run in server.runs.values())
            return destroy(request, number)

        vast._destroy = look_first  # type: ignore[method-assign]
        code, said = ended(shutdown(environment, "--grace-s=0"))
        assert (code, vast.destroyed) == (0, [instance.id])
        assert at_server == [list(range(200))]

        cluster.run_driver(DRIVER.format(settings={"mode": "offline"}, rows=3))
        second = vast.launch()
        environment = cluster.environment | on(second, vast)
        code, said = ended(shutdown(environment, "--grace-s=0"))
        assert (code, list(vast.instances)) == (outcomes.EXIT_OFFLINE, [second.id])
        assert "its 3 rows lie in" in said
        code, said = ended(shutdown(environment, "--grace-s=0", "--even-if-undelivered"))
        assert (code, vast.destroyed) == (0, [instance.id, second.id])
        until("nothing to be left", lambda: not vast.instances)


@pytest.mark.skipif(not os.environ.get("RAYWB_LONG"), reason="RAYWB_LONG=1: it takes 20 s")
def test_a_head_ends_its_own_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own `ray down`, from the head's description, on an AWS that is on loopback: head and
    worker are terminated, another cluster is not; where `ray down` fails, that is no success."""
    cloud = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    cloud.start()
    host, port = cloud.get_host_and_port()
    (tmp_path / "key.pem").touch()
    (tmp_path / "ssh").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    for name, text in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-west-2",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, text)
    try:
        ec2 = boto3.client("ec2")
        image = ec2.describe_images()["Images"][0]["ImageId"]

        def node(cluster: str, kind: str) -> str:
            tags = {"ray-cluster-name": cluster, "ray-node-type": kind}
            listed = [{"Key": name, "Value": text} for name, text in tags.items()]
            specification = [{"ResourceType": "instance", "Tags": listed}]
            made = ec2.run_instances(
                ImageId=image, MinCount=1, MaxCount=1, TagSpecifications=specification
            )
            return str(made["Instances"][0]["InstanceId"])

        head, worker, other = node("ours", "head"), node("ours", "worker"), node("theirs", "head")
        config = {
            "SubnetIds": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]],
            "SecurityGroupIds": [ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]],
            **{"ImageId": image, "InstanceType": "m5.large", "KeyName": "key"},
            "IamInstanceProfile": {"Name": "ray-autoscaler-v1"},
        }
        types = {"head": {"node_config": config, "resources": {"CPU": 1}, "max_workers": 0}}
        description = {
            **{"cluster_name": "ours", "max_workers": 1, "head_node_type": "head"},
            "provider": {"type": "aws", "region": "us-west-2", "use_internal_ips": True}
            | {"cache_stopped_nodes": False},
            "auth": {"ssh_user": "ubuntu", "ssh_private_key": str(tmp_path / "key.pem")},
            "available_node_types": types,
        }
        (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(description))
        place = choose_place("auto", None, {"HOME": str(tmp_path)})
        assert not isinstance(place, str)
        assert "has ended" in place.end()
        found = {
            one["InstanceId"]: one["State"]["Name"]
            for reservation in ec2.describe_instances()["Reservations"]
            for one in reservation["Instances"]
        }
        assert found == {head: "terminated", worker: "terminated", other: "running"}
        (tmp_path / "ray_bootstrap_config.yaml").write_text("cluster_name: ours\n")
        with pytest.raises(EndFailed, match="`ray down` from the launching machine"):
            place.end()
    finally:
        cloud.stop()
