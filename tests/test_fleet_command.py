"""`raywb fleet` as people and schedulers run it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import psutil
import pytest
import yaml
from click.testing import CliRunner
from datadog_server import DatadogServer
from fleet_runs import ENTITY, HOUR_S, fleet_environment, put_run, run_fleet, start_fleet
from wandb_client import API_KEY
from wandb_server import WandbServer

from raywb.cli import main
from raywb.errors import FleetError, RaywbError, SettingsError
from raywb.fleet.choice import parse_address
from raywb.fleet.cycle import Outcome, parse_interval, repeat

MANIFEST = Path(__file__).parents[1] / "raywb" / "launch" / "fleet-cronjob.yaml"
MAIN = "github.sky.main.0a1b2c.tiny.2026-11-20"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer(entity=ENTITY) as server:
        put_run(server.store, "r", name=MAIN, summary={"overview/sps": 1250.0})
        yield server


def test_the_terminal(server: WandbServer, tmp_path: Path) -> None:
    """A dry run prints the metrics, with `--verbose` what stands behind them, and sends nothing."""
    put_run(
        server.store, "s", state="running", created_ago_s=9 * HOUR_S, heartbeat_ago_s=5 * HOUR_S
    )
    put_run(server.store, "t", config={"compute.gpu_count": 8})
    put_run(
        server.store, "u", name=MAIN, summary={"overview/sps": "NaN"}, heartbeat_ago_s=3 * HOUR_S
    )
    ended = run_fleet(fleet_environment(tmp_path, server, DD_API_KEY="k"), "--verbose")
    assert ended.returncode == 0
    lines = " ".join(ended.stdout.split())
    for text in (
        "robots/sky, 24 h up to",
        "wandb.runs.completed_24h 3",
        "wandb.training.total_gpu_hours_24h 9.00",
        "wandb.push_to_main.overview.sps 1,250.00",
        "4 runs, 3 requests",
        "8.00 recorded by 1 runs, 1.00 assumed for 1 runs",
        "1 ended runs, whose times contradict each other",
        "overview/sps of 1 run",
        "overview/sps 1,250.00 (only 0 earlier runs to compare with)",
        "s (s) claims to be running, not heard of for 5.0 h",
    ):
        assert text in lines
    assert "dry run" in ended.stderr


def test_push(server: WandbServer, tmp_path: Path) -> None:
    """`--push` sends to Datadog; a file may be written as well."""
    with DatadogServer("k" * 32) as datadog:
        further = {"DD_API_KEY": "k" * 32, "DD_URL": datadog.url}
        environment = fleet_environment(tmp_path, server, **further)
        arguments = ("--push", "--tag", "team:robots", "--openmetrics", "out.prom")
        ended = run_fleet(environment, *arguments, "--json")
        assert ended.returncode == 0, ended.stderr
        printed = {one["name"]: one["value"] for one in json.loads(ended.stdout)["metrics"]}
        sent = {name: one["points"][0]["value"] for name, one in datadog.series.items()}
        assert sent == printed
        assert datadog.series["wandb.runs.active"]["tags"] == [
            "entity:robots",
            "project:sky",
            "team:robots",
        ]
        assert (tmp_path / "out.prom").read_text().endswith("# EOF\n")


def test_a_failing_outlet_is_a_partial_result(server: WandbServer, tmp_path: Path) -> None:
    """Datadog refuses: the others have the metrics, one sentence says so, the code is its own."""
    with DatadogServer("another") as datadog:
        further = {"DD_API_KEY": "k" * 32, "DD_URL": datadog.url}
        environment = fleet_environment(tmp_path, server, **further)
        ended = run_fleet(environment, "--push", "--openmetrics", "out.prom")
        assert ended.returncode == 24
        assert "wandb.runs.active" in ended.stdout
        assert "Datadog did not take the metrics" in ended.stderr
        assert "403" in ended.stderr
        assert (tmp_path / "out.prom").exists()


def test_a_trickling_outlet(server: WandbServer, tmp_path: Path) -> None:
    """The limit holds for an outlet that trickles, too."""
    with DatadogServer("k" * 32) as datadog:
        datadog.trickles = True
        further = {"DD_API_KEY": "k" * 32, "DD_URL": datadog.url}
        environment = fleet_environment(tmp_path, server, **further)
        began = time.monotonic()
        ended = run_fleet(environment, "--push", "--limit-s", "5")
        assert time.monotonic() - began < 8
        assert ended.returncode == 24
        assert "took nothing within 5 s" in ended.stderr


def test_staying(server: WandbServer, tmp_path: Path) -> None:
    """`--every` goes on through failures, is scraped, and ends in good order when told to."""
    environment = fleet_environment(tmp_path, server)
    process = start_fleet(environment, "--every", "1s", "--serve", "0", "--json", "--limit-s", "3")
    try:
        assert process.stderr is not None
        assert process.stdout is not None
        address = process.stderr.readline().split()[-1]
        assert json.loads(process.stdout.readline())["metrics"]
        put_run(server.store, "second")
        while True:
            metrics = json.loads(process.stdout.readline())["metrics"]
            if {"name": "wandb.runs.completed_24h", "value": 2} in metrics:
                break
        with urllib.request.urlopen(address, timeout=10) as response:
            text = response.read().decode()
        assert 'wandb_runs_completed_24h{entity="robots",project="sky"} 2.0' in text
        server.hang("graphql")
        assert "did not give all" in process.stderr.readline()
        server.behave()
        assert json.loads(process.stdout.readline())["metrics"]
        # In the middle of a collection, too, with nothing left behind.
        server.hang("graphql")
        before = server.disturbed["graphql"]
        server.wait_until(lambda: server.disturbed["graphql"] > before)
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        _, alive = psutil.wait_procs(started, timeout=5)
        assert alive == []
    finally:
        process.kill()
        process.communicate()


def test_a_killed_command_leaves_nothing(server: WandbServer, tmp_path: Path) -> None:
    """Whoever kills the command in the middle has killed what it started, and no file is left."""
    server.hang("graphql")
    (tmp_path / "tmp").mkdir()
    process = start_fleet(fleet_environment(tmp_path, server, TMPDIR=str(tmp_path / "tmp")))
    try:
        server.wait_until(lambda: server.disturbed["graphql"] >= 1)
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        assert list((tmp_path / "tmp").iterdir())
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_names_with_brackets(server: WandbServer, tmp_path: Path) -> None:
    """Names of runs are printed as they are, whatever they look like."""
    names = ("exp[/tmp/x]", "[red]", "a :smile: b")
    for index, name in enumerate(names):
        put_run(server.store, f"s{index}", name=name, state="running", heartbeat_ago_s=2 * HOUR_S)
    ended = run_fleet(fleet_environment(tmp_path, server), "--verbose")
    assert ended.returncode == 0, ended.stderr
    for index, name in enumerate(names):
        assert f"{name} (s{index}) claims to be running" in ended.stdout


def test_staying_through_errors_of_any_kind() -> None:
    """An error that is not ours is told by its name, without its text, and the next one comes."""
    told: list[Outcome | RaywbError] = []
    ended = threading.Event()

    def cycle() -> Outcome:
        if told:
            ended.set()
        raise ZeroDivisionError("a key")

    repeat(0.01, cycle, tell=told.append, ended=ended)
    assert len(told) == 2
    for one in told:
        assert isinstance(one, FleetError)
        assert "ZeroDivisionError in test_fleet_command.py" in str(one)
        assert "a key" not in str(one)


def test_push_without_a_key_beside_others(server: WandbServer, tmp_path: Path) -> None:
    """Datadog's key is missing: the file is written all the same; alone, it is one error."""
    environment = fleet_environment(tmp_path, server)
    ended = run_fleet(environment, "--push", "--openmetrics", "out.prom")
    assert ended.returncode == 24
    assert "Datadog did not take the metrics: DD_API_KEY is not set" in ended.stderr
    assert (tmp_path / "out.prom").exists()
    assert run_fleet(environment, "--push").returncode == 23


def test_staying_with_a_wrong_key(tmp_path: Path) -> None:
    """What the next collection would meet as well ends `--every` at once."""
    with WandbServer(entity=ENTITY, api_key="f" * 40) as server:
        assert server.api_key != API_KEY
        ended = run_fleet(fleet_environment(tmp_path, server), "--every", "15m")
    assert (ended.returncode, ended.stdout) == (20, "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--every", "15"], "every='15' cannot be used"),
        (["--every", "0.1s"], "every='0.1s' cannot be used"),
        (["--serve", "9469"], "serve needs every"),
        (["--serve", "here", "--every", "15m"], "serve='here' cannot be used"),
        (["--stop"], "stop goes with on-cluster"),
        (["--limit-s", "121"], "limit_s=121 cannot be used"),
        (["--limit-s", "0"], "limit_s=0 cannot be used"),
        (["--window-hours", "0"], "window_hours=0 cannot be used"),
        (["--assumed-gpus", "-1"], "assumed_gpus=-1 cannot be used"),
        (["--assumed-gpus", "nan"], "assumed_gpus=nan cannot be used"),
        (["--assumed-gpus", "inf"], "assumed_gpus=inf cannot be used"),
        (["--window-hours", "nan"], "window_hours=nan cannot be used"),
    ],
)
def test_wrong_usage(arguments: list[str], sentence: str) -> None:
    """What cannot be used is named, with what can."""
    ended = CliRunner().invoke(main, ["fleet", *arguments])
    assert ended.exit_code == 2
    assert sentence in ended.output


def test_intervals_and_addresses() -> None:
    """Intervals have a unit; an address without a host is the loopback's."""
    assert [parse_interval(text) for text in ("90s", "15m", "1.5h", "1d")] == [90, 900, 5400, 86400]
    assert parse_address("9469") == ("127.0.0.1", 9469)
    assert parse_address("0.0.0.0:9469") == ("0.0.0.0", 9469)
    with pytest.raises(SettingsError, match="65536"):
        parse_address("65536")


def test_the_help_costs_nothing() -> None:
    """`raywb --help` names the command, and neither it nor the command loads what it needs."""
    code = """
        import sys
        from raywb.cli import main
        try:
            main(sys.argv[1:])
        finally:
            heavy = {"wandb", "ray", "datadog_api_client", "boto3", "prometheus_client", "rich"}
            print(sorted(heavy & set(sys.modules)), file=sys.stderr)
    """
    for arguments in (["--help"], ["fleet", "--help"]):
        ended = subprocess.run(
            [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines()), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert "fleet" in ended.stdout
        assert ended.stderr.strip() == "[]"


def test_the_manifest() -> None:
    """The CronJob is what Kubernetes' schema allows, and runs a command that there is."""
    documents = list(yaml.safe_load_all(MANIFEST.read_text()))
    version = kubernetes_validate.latest_version()
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    account, job = documents
    assert (account["kind"], job["kind"]) == ("ServiceAccount", "CronJob")
    assert any("role-arn" in name for name in account["metadata"]["annotations"])
    assert job["spec"]["schedule"] == "*/15 * * * *"
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    (container,) = pod["containers"]
    command, *arguments = [*container["command"], *container["args"]]
    assert command == "raywb"
    assert CliRunner().invoke(main, [*arguments, "--help"]).exit_code == 0
    assert "--push" in arguments
    job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["restart"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)
