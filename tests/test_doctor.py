"""`raywb doctor` names what is wrong and what to do, whatever else fails; here without Ray."""

from __future__ import annotations

import json
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from small_disk import small_disk
from wandb_client import API_KEY
from wandb_server import WandbServer

from raywb import __version__
from raywb.cli import main
from raywb.doctor import charts, disks, examination, nodes, on_node, service, wandb_key
from raywb.doctor.cluster_look import look_at_cluster
from raywb.doctor.cluster_process import refusal
from raywb.doctor.examination import examine
from raywb.doctor.findings import Diagnosis, Finding
from raywb.doctor.look import (
    ClusterLook,
    ClusterRequest,
    Connected,
    DiskLook,
    KeyLook,
    NodeLook,
    RunAtServer,
    ServerLook,
    ServiceLook,
    WandbLook,
    WandbRequest,
)
from raywb.doctor.ray_address import check_address, name_address
from raywb.doctor.ray_environment import VARIABLES, check_environment, check_state_api
from raywb.doctor.wandb_access import key_problem, look_at_wandb
from raywb.reports import RunInfo, SinkStatus, SourceStatus, Status
from raywb.settings import child_environment, process_environment
from recipes.local_ray import XENNA_ENVIRONMENT

GOOD = {one.name: one.value for one in VARIABLES}


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer(entity="robots", api_key=API_KEY) as server:
        yield server


def node(name: str = "a", **changes: Any) -> NodeLook:
    """A node on which all is well."""
    values: dict[str, Any] = {
        "node_id": name * 56,
        "name": name,
        "is_head": name == "a",
        "cpus": 8.0,
        "gpus": 0.0,
        "processes": {"raylet": dict(GOOD)},
        "imports": {"raywb": (__version__, None)},
        "versions": {"ray": "2.60.0"},
        "clock_ahead_s": 0.0,
    }
    return NodeLook(**values | changes)


def cluster(*there: NodeLook, available: float = 100.0, **changes: Any) -> ClusterLook:
    connected = Connected(address="x:1", ray_version="2.60.0", available_cpus=available)
    return ClusterLook(connected=connected, nodes=list(there), **changes)


def told(findings: list[Finding], state: str, *texts: str) -> None:
    """One finding has this state and, in what it found or in its remedy, these texts."""
    matching = [
        one
        for one in findings
        if one.state == state and all(text in f"{one.found} {one.remedy}" for text in texts)
    ]
    assert len(matching) == 1, findings
    assert state == "well" or matching[0].remedy, "what is wrong has a remedy"


# -- the cluster's nodes -----------------------------------------------------------------------


def test_the_variables_are_those_that_a_local_cluster_gets() -> None:
    """raywb cannot import the recipes, so both have the list; it is the same."""
    assert GOOD == XENNA_ENVIRONMENT


def test_a_variable_that_is_missing_is_named_with_its_place() -> None:
    """Which variable, for which processes, on which nodes, why, and where to put it."""
    assert check_environment(cluster(node(), node("b")))[0].state == "well"
    name = "RAY_MAX_LIMIT_FROM_API_SERVER"
    lacking = {**GOOD, name: None}
    processes = {"raylet": GOOD, "gcs_server": lacking, "dashboard": {**GOOD, name: "20000"}}
    found = check_environment(cluster(node(processes=processes), node("b")))
    texts = ("on 1 of 2 nodes (a aaaaaaaa)", "dashboard and gcs_server", "exceeds the supported")
    told(found, "trouble", f"{name}=20000 is not 40000", "docker: run_options", *texts)
    assert len(found) == 1
    told(
        check_environment(cluster(node(processes={"raylet": {**GOOD, name: "50000"}}))),
        "well",
        name,
    )


def test_a_head_that_tells_nobody_of_its_actors() -> None:
    """Without a dashboard there is no state API, and xenna's monitor fails."""
    assert check_state_api(cluster(node())) == []
    connected = Connected(
        address="x:1", ray_version="2", available_cpus=1, state_api_error="no dashboard"
    )
    found = check_state_api(ClusterLook(connected=connected))
    told(found, "trouble", "no dashboard", "--include-dashboard=true")


def test_the_gpu_variable_matters_where_there_are_gpus() -> None:
    """It is trouble on a node with GPUs, and a warning before there is one."""
    lacking = {"raylet": {**GOOD, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0"}}
    told(check_environment(cluster(node(processes=lacking, gpus=1))), "trouble", "NOSET", "=0")
    told(check_environment(cluster(node(processes=lacking))), "warning", "no GPU there yet")


def test_processes_that_cannot_be_read_are_said_to_be() -> None:
    """Ray that runs as another user shows its environment to nobody."""
    hidden = node(processes={}, failed={"processes": "PermissionError: no"})
    told(check_environment(cluster(hidden)), "warning", "PermissionError", "same user")


@pytest.mark.parametrize(
    ("there", "state", "text"),
    [
        ([node()], "well", "8 on 1 node"),
        ([node(cpus=2.0)], "trouble", "needs 3 CPUs"),
        ([node(cpus=2.0, autoscales=True)], "well", "more come"),
        ([node(), node("b", cpus=0.0)], "trouble", "none on 1 of 2 nodes (b bbbbbbbb)"),
    ],
)
def test_cpus(there: list[NodeLook], state: str, text: str) -> None:
    """One CPU on each node is for xenna's monitor, and the stages need some, too."""
    told(nodes.check_cpus(cluster(*there)), state, text)


def test_cpus_that_others_have() -> None:
    """A pipeline that is started now would wait."""
    told(nodes.check_cpus(cluster(node(), available=1.0)), "warning", "1 of 8 CPUs are free")


def test_versions() -> None:
    """raywb, Ray and Python have to be the same everywhere; others are better so."""
    same = {"raywb": (__version__, None)}
    here = {"ray": "2.60.0"}
    assert nodes.check_versions(cluster(node(), node("b")), here)[0].state == "well"
    other = node("b", imports={"raywb": ("0.0.1", None)}, versions={"ray": "2.60.0"})
    found = nodes.check_versions(cluster(node(), other), here)
    told(found, "trouble", "raywb is not the same on 1 of 2 nodes (b bbbbbbbb): 0.0.1")
    found = nodes.check_versions(cluster(other), here)
    told(found, "trouble", f"raywb is {__version__} here, and 0.0.1 on the cluster")
    torches = [node(name, versions={"torch": name}, imports=same) for name in "ab"]
    told(nodes.check_versions(cluster(*torches), here), "warning", "torch is not the same")


def test_imports() -> None:
    """A module that cannot be imported is told with its node, and the trap of tqdm by name."""
    missing = "ModuleNotFoundError: No module named"
    imports = {
        "raywb": (None, f"{missing} 'raywb'"),
        "cosmos_xenna.pipelines.v1": (None, f"{missing} 'tqdm'"),
        "recipes.pipeline": (None, f"{missing} 'recipes'"),
        "wandb": ("0.31.0", None),
    }
    found = nodes.check_imports(cluster(node(), node("b", imports=imports)))
    assert len(found) == 3
    told(found, "trouble", "`import raywb` fails on 1 of 2 nodes", "pip install raywb")
    told(found, "trouble", "without declaring it: `pip install tqdm`")
    told(found, "trouble", "import recipes.pipeline", "--working-dir .")


def test_clocks() -> None:
    """Only what is surely apart counts, a little as a warning, much as trouble."""
    head = node(clock_ahead_s=100.0, clock_error_s=0.5)
    well = node("b", clock_ahead_s=103.4, clock_error_s=1.0)
    assert nodes.check_clocks(cluster(head, well))[0].state == "well"
    told(
        nodes.check_clocks(cluster(head, node("b", clock_ahead_s=90.0))),
        "warning",
        "off by up to 10 s (behind the head's) on 1 of 2 nodes (b bbbbbbbb)",
    )
    told(nodes.check_clocks(cluster(head, node("b", clock_ahead_s=900.0))), "trouble", "800 s")


def test_nodes_that_do_not_answer() -> None:
    """They are named, and what could not be looked at on the others, too."""
    look = cluster(node(failed={"imports": "TimeoutError: slow"}), unanswered={"b 1": "hangs"})
    found = nodes.check_answers(look)
    told(found, "trouble", "on 1 of 2 nodes (b 1): hangs")
    told(found, "warning", "imports could not be looked at", "TimeoutError: slow")


# -- disks -------------------------------------------------------------------------------------


def test_a_full_disk_is_found_by_writing_to_it(tmp_path: Path) -> None:
    """What counts is whether bytes are taken, not what the disk says of itself."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        place = on_node.look_at_disk("raywb's directory", str(disk.path / "to/be/made"))
        small = msgspec.convert(place, DiskLook)
        assert small.error is None
        told(disks.check_disks({"a": [small]}), "trouble", "MB of 1.0 MB left", "RAYWB_DIR")
        disk.fill(but_bytes=4096)
        full = msgspec.convert(on_node.look_at_disk(small.use, small.path), DiskLook)
        told(disks.check_disks({"a": [full]}), "trouble", "No space left on device", "RAYWB_DIR")


def test_a_disk_that_is_nearly_full_is_a_warning() -> None:
    """Little room, or so little that Ray writes no objects any more."""
    gb = 1_000_000_000
    little = DiskLook(use="raywb's directory", path="/r", free_bytes=gb, total_bytes=100 * gb)
    told(disks.check_disks({"a": [little]}), "warning", "1.0 GB of 100.0 GB left")
    rays = DiskLook(
        use="Ray's session directory", path="/t", free_bytes=10 * gb, total_bytes=1000 * gb
    )
    told(disks.check_disks({"a": [rays], "b": []}), "warning", "on 1 of 2 nodes (a)")
    assert disks.check_disks({"a": [msgspec.structs.replace(rays, use="other")]})[0].state == "well"


# -- W&B ---------------------------------------------------------------------------------------


def look(server: WandbServer, **changes: Any) -> WandbLook:
    return look_at_wandb(WandbRequest(**{"base_url": server.url, "limit_s": 10.0} | changes))


def verdict(found: WandbLook, entity: str | None = None) -> Finding:
    (finding,) = wandb_key.check_server(found, entity, "from here", None)
    return finding


def test_a_key_that_is_accepted(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's server is asked who it is; the entity has to be one of his."""
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    found = look(server)
    assert found.key == KeyLook(origin="WANDB_API_KEY")
    assert verdict(found, "robots").state == "well"
    assert "robots" in verdict(found).found
    assert verdict(found, "others").state == "warning"
    assert server.errors == []


def test_a_key_in_netrc_is_told_by_its_place(server: WandbServer, tmp_path: Path) -> None:
    """Where it was found is said, never what it is."""
    netrc = Path(process_environment()["HOME"]) / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login user password {API_KEY}\n")
    netrc.chmod(stat.S_IRUSR)
    found = look(server)
    assert found.key is not None
    assert found.key.origin == f"{netrc}, for 127.0.0.1"
    mounted = tmp_path / "key"
    mounted.write_text(f"{API_KEY}\n")
    found = look(server, api_key_file=str(mounted))
    assert found.key == KeyLook(origin=str(mounted))
    assert verdict(found).state == "well"
    assert API_KEY not in repr(found)


@pytest.mark.parametrize(
    ("status", "state", "text"),
    [
        (401, "trouble", "does not accept the key of WANDB_API_KEY"),
        (500, "warning", "it answered 500"),
    ],
)
def test_a_server_that_refuses(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, status: int, state: str, text: str
) -> None:
    """A key that is not accepted is told from a server that is not well."""
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    server.misbehave("graphql", status=status)
    try:
        finding = verdict(look(server))
    finally:
        server.behave()
    assert (finding.state, text in finding.found) == (state, True)
    assert API_KEY not in repr(finding)


@pytest.mark.parametrize("way", ["hang", "trickle"])
def test_a_server_that_never_answers_costs_a_set_time(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Neither silence nor an answer byte by byte holds the check up."""
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    getattr(server, way)("graphql")
    began = time.monotonic()
    try:
        finding = verdict(look(server, limit_s=1.0))
    finally:
        server.behave()
    assert time.monotonic() - began < 5.0
    assert finding.state == "trouble"
    assert "did not answer within 1 s" in finding.found


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trouble for a run that is to be online, and none is for one that is not."""
    found = look_at_wandb(WandbRequest(base_url=f"http://127.0.0.1:{closed_port()}"))
    assert verdict(found).state == "warning", "there is no key, so nothing was to be sent"
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    found = look_at_wandb(WandbRequest(base_url=f"http://127.0.0.1:{closed_port()}"))
    assert verdict(found).state == "trouble"
    assert "Connection refused" in verdict(found).found
    offline = look_at_wandb(WandbRequest(base_url="http://127.0.0.1:9", ask_server=False))
    assert verdict(offline).state == "well"


def test_keys_as_they_look() -> None:
    """What W&B's client would refuse for its form is found before anybody is asked."""
    assert key_problem(API_KEY) is None
    assert key_problem(f"local-{API_KEY}") is None
    assert key_problem("wandb_v1_" + "a_B9" * 12) is None
    assert "39 characters" in (key_problem("a" * 39) or "")
    assert "blanks" in (key_problem(f"{API_KEY} ") or "")
    assert "no key has" in (key_problem("$" + "a" * 40) or "")


def test_the_key_has_to_be_where_the_service_is() -> None:
    """A key that only the driver has is a warning; none is trouble for a run that is online."""
    key = KeyLook(origin="WANDB_API_KEY")
    have = WandbLook(base_url="u", key=key, server=ServerLook(reached=True))
    lack = WandbLook(base_url="u", key=None, server=None)
    cases = [
        ((have, have, "online"), "well"),
        ((have, lack, "online"), "warning"),
        ((lack, lack, "online"), "trouble"),
        ((lack, lack, None), "warning"),
        ((lack, None, "offline"), "well"),
    ]
    for case, state in cases:
        (finding,) = wandb_key.check_key(*case)
        assert finding.state == state, finding
    (finding,) = wandb_key.check_key(lack, lack, "online", handed_over=True)
    assert finding.state == "warning"
    bad = WandbLook(base_url="u", key=KeyLook(origin="x", problem="it is short"), server=None)
    told(wandb_key.check_key(bad, None, None), "trouble", "it is short")


# -- the service -------------------------------------------------------------------------------


def status(**changes: Any) -> Status:
    """A service with which all is well."""
    run = RunInfo(project="p", id="r", name="n", mode="online", dir="/d", entity="robots")
    source = SourceStatus(
        source_id="s",
        hostname="h",
        node_id="n",
        pid=7,
        stages=["t"],
        received_bytes=1,
        received_rows=9,
        heard_ago_s=1.0,
        ended=False,
    )
    values: dict[str, Any] = {
        "version": __version__,
        "run": run,
        "finished": False,
        "address": "h:1",
        "incarnation": 1,
        "received_rows": 9,
        "outbox_rows": 9,
        "backlog_rows": 0,
        "lost": {},
        "rejected": 0,
        "after_finish_rows": 0,
        "sink": SinkStatus(state="running", applied_rows=9, restarts=0, confirmed_rows=9),
        "sources": [source],
        "problems": [],
    }
    return Status(**values | changes)


def check(**changes: Any) -> list[Finding]:
    return service.check_service(ServiceLook(status=status(**changes)))


def test_a_service_that_is_well() -> None:
    """Every part of it is said to be."""
    assert {one.state for one in check()} == {"well"}


def test_the_troubles_of_a_service() -> None:
    """What its status says becomes findings with remedies."""
    told(service.check_service(ServiceLook()), "warning", "none runs", "raywb.attach()")
    told(service.check_service(ServiceLook(error="no answer")), "trouble", "no answer")
    told(check(version="9"), "trouble", f"it is raywb 9, this process has {__version__}")
    told(check(problems=["the ledger's disk is full"]), "trouble", "the ledger's disk is full")
    told(check(warnings=["nodes differ"]), "warning", "nodes differ")
    told(check(lost={"disk_full": 3}), "warning", "lost: 3 disk_full")
    told(check(rejected=2), "warning", "2 values rejected", "strict=True")
    told(check(sources=[]), "warning", "nobody has attached")
    silent = msgspec.structs.replace(status().sources[0], heard_ago_s=95.0)
    told(check(sources=[silent]), "warning", "silent for up to 95 s: h pid 7 (t)", "py-spy")
    (found,) = [one for one in check(sources=[silent], silence_s=300.0) if one.check == "who logs"]
    assert found.state == "well", "of 10,000 sources each says every 100 s that it lives"
    sink = SinkStatus(state="retrying", applied_rows=0, restarts=3, last_error="403")
    told(check(sink=sink, backlog_rows=9), "trouble", "9 on the way", "retrying: 403")
    offline = msgspec.structs.replace(status().run, mode="offline")
    told(check(after_finish_rows=4), "warning", "4 rows came after finish()")
    told(check(run=offline), "warning", "the run is offline", "`raywb sync /d`")


def test_why_charts_are_empty() -> None:
    """Another project, no rows at W&B, a run that is not there, a stage without a speed."""
    environment = {"WANDB_PROJECT": "q", "WANDB_ENTITY": "robots"}
    told(charts.check_charts(status(), None, environment), "warning", "WANDB_PROJECT is q here")
    first = msgspec.structs.replace(status().run, provisional=True)
    told(charts.check_charts(status(run=first), None, {}), "warning", "before any start()")
    at_server = RunAtServer(known=True, rows=9)
    told(charts.check_charts(status(), at_server, {}), "well", "<stage>/step", "raywb charts")
    told(charts.check_charts(status(), RunAtServer(known=False), {}), "trouble", "knows no run")
    empty = RunAtServer(known=True, rows=0)
    told(charts.check_charts(status(), empty, {}), "warning", "has none of 9 rows")
    slow = RunAtServer(known=True, rows=9, stages_without_speed={"download_stage": 1})
    told(
        charts.check_charts(status(), slow, {}),
        "warning",
        "no speed_tasks_per_s of download_stage (1 task done)",
        "enough tasks",
    )


def test_what_the_server_has_of_the_run(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and summary are asked of the server: stages that have tasks and no speed are found."""
    from fleet_runs import put_run

    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    summary = {
        "xenna/stage/plan_stage/tasks_completed": 40,
        "xenna/stage/plan_stage/speed_tasks_per_s": 2.5,
        "xenna/sft_2/stage/download_stage/tasks_completed": 1,
    }
    put_run(server.store, "r", summary=summary)
    asked = {"entity": "robots", "project": "sky"}
    found = look(server, **asked, run_id="r").server
    assert found is not None
    assert found.run == RunAtServer(
        known=True, rows=0, state="finished", stages_without_speed={"download_stage": 1}
    )
    found = look(server, **asked, run_id="other").server
    assert found is not None
    assert found.run == RunAtServer(known=False)
    assert server.errors == []


# -- the command -------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_doctor(*arguments: str, **environment: str) -> tuple[int, str]:
    ended = CliRunner(env=environment).invoke(main, list(arguments))
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.output


def test_without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It says that there is none and how to name one, checks this machine, and is content."""
    monkeypatch.chdir(tmp_path)
    # Whoever runs the tests may have a cluster on this machine.
    monkeypatch.setattr(
        examination, "look_at_cluster", lambda *_, **__: ClusterLook(refused=none_there())
    )
    code, output = run_doctor("doctor", WANDB_MODE="offline")
    assert code == 0, output
    assert "! Ray cluster: there is none on this machine\n    → `ray start --head`" in output
    assert "✓ imports: this Python can import" in output
    assert "✓ disk:" in output
    assert "✓ W&B key: none is needed: the run is offline" in output
    home = Path(process_environment()["HOME"])
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("t")
    monkeypatch.delenv("RAY_AUTH_MODE")
    code, output = run_doctor("doctor", "--json", WANDB_MODE="offline")
    diagnosis = msgspec.json.decode(output, type=Diagnosis)
    assert (code, diagnosis.is_well, diagnosis.cluster) == (0, True, None)
    told(diagnosis.findings, "warning", "auth_token", "RAY_AUTH_MODE=disabled")


def none_there() -> Any:
    from raywb.doctor.look import NotConnected

    return NotConnected(kind="none", text="Could not find any running Ray instance")


def test_an_address_where_nobody_is() -> None:
    """RAY_ADDRESS that names a dead cluster is found in a moment; Ray would wait for minutes."""
    port = closed_port()
    began = time.monotonic()
    code, output = run_doctor("doctor", RAY_ADDRESS=f"127.0.0.1:{port}", WANDB_MODE="offline")
    assert time.monotonic() - began < 30
    assert code == 7
    assert f"✗ Ray cluster: nothing answers at 127.0.0.1:{port} (RAY_ADDRESS)" in output
    assert "`unset RAY_ADDRESS`" in output
    assert "W&B key" in output, "the other checks go on"
    arguments = ("--address", "http://127.0.0.1:8265", "doctor", "--json")
    code, output = run_doctor(*arguments, WANDB_MODE="offline")
    assert code == 7
    found = json.loads(output)
    assert found["version"] == __version__
    assert "is where jobs are submitted" in found["findings"][0]["found"]
    assert set(found["findings"][0]) == {"check", "state", "found", "remedy"}


def test_the_reason_lies_behind_what_ray_says() -> None:
    """Ray says that it failed to connect; that a token was refused led to it (seen with 2.60)."""
    try:
        try:
            raise RuntimeError("RPC error: InvalidAuthToken: missing or incorrect")
        except RuntimeError as cause:
            raise ConnectionError("Failed to connect to Ray cluster at h:1") from cause
    except ConnectionError as error:
        refused = refusal(error)
    assert (refused.kind, refused.text) == (
        "authentication",
        "Failed to connect to Ray cluster at h:1",
    )
    assert refusal(ConnectionError("Could not find any running Ray instance.")).kind == "none"
    assert refusal(RuntimeError("Version mismatch: The cluster was started")).kind == "version"
    assert refusal(ConnectionError("Failed to connect")).kind == "other"
    (found,) = check_address(
        name_address("h:1", {}), ClusterLook(refused=refused), {}, Path("/nowhere")
    )
    told([found], "trouble", "does not let this process in", "RAY_AUTH_MODE is not set here")


@pytest.mark.parametrize(
    ("option", "variable", "found"),
    [
        ("auto", None, "auto"),
        ("h:1", "g:2", "h:1 (--address)"),
        ("auto", "g:2", "g:2 (RAY_ADDRESS)"),
        ("local", "local", "auto"),
    ],
)
def test_which_address_counts(option: str, variable: str | None, found: str) -> None:
    """The command's, then the environment's; and never one at which Ray would start a cluster."""
    environment = {"RAY_ADDRESS": variable} if variable else {}
    assert str(name_address(option, environment)) == found


def test_something_else_that_listens_there() -> None:
    """The process that asks is ended when its time is over."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        request = ClusterRequest(
            address=f"127.0.0.1:{silent.getsockname()[1]}",
            variables=[],
            modules=[],
            wandb=WandbRequest(),
        )
        began = time.monotonic()
        found = look_at_cluster(request, child_environment(process_environment()), limit_s=3.0)
    assert time.monotonic() - began < 15
    assert found.connected is None
    assert found.ended == "no answer within 3 s" or found.refused is not None


def test_a_check_that_fails_says_so_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of the doctor's own is a warning among the findings."""

    def broken(*_: object) -> list[Finding]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(examination.disks, "check_disks", broken)
    environment = {"RAY_ADDRESS": f"127.0.0.1:{closed_port()}", "WANDB_MODE": "offline"}
    diagnosis = examine(None, environment)
    told(diagnosis.findings, "warning", "this check itself failed: ZeroDivisionError: a bug")
    assert diagnosis.findings[-1].check == "W&B server"
    diagnosis = examine(None, environment | {"WANDB_MODE": "sometimes"})
    told(diagnosis.findings, "trouble", "mode='sometimes' cannot be used")


def test_on_a_terminal_it_is_a_table(tmp_path: Path) -> None:
    """A person sees marks and wrapped lines; what is piped on has a line for each finding."""
    script = (
        "import pty, sys\nsys.exit(pty.spawn([sys.executable, '-m', 'raywb', 'doctor']) >> 8)\n"
    )
    environment = child_environment(process_environment()) | {
        "RAY_ADDRESS": f"127.0.0.1:{closed_port()}",
        "WANDB_MODE": "offline",
        "TERM": "xterm",
        "COLUMNS": "80",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 7, done.stdout + done.stderr
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    assert lines[0].startswith("✗ Ray cluster nothing answers at")
    assert max(map(len, lines)) <= 80
