"""Keys come from the environment or AWS Secrets Manager, and are shown nowhere."""

from __future__ import annotations

import json
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import yaml
from datadog_server import DatadogServer
from fleet_runs import ENTITY, PROJECT, fleet_environment, put_run, run_fleet, start_fleet
from moto.server import ThreadedMotoServer
from wandb_server import WandbServer

from raywb.errors import FleetError, SecretMissing, SettingsError
from raywb.fleet import cycle
from raywb.fleet.collector import FleetSettings
from raywb.fleet.credentials import Credentials, Secret, find_credentials
from raywb.fleet.deadline import Deadline
from raywb.settings import fleet_reader_environment

MANIFEST = Path(__file__).parents[1] / "raywb" / "launch" / "fleet-cronjob.yaml"
WANDB_KEY = "5ec7e7" * 7
DATADOG_KEY = "d09d09" * 6
NAME = "dev/datadog/collectors/wandb"
WHOLE = {
    "WANDB_API_KEY": WANDB_KEY,
    "WANDB_ENTITY": ENTITY,
    "WANDB_PROJECT": PROJECT,
    "DD_API_KEY": DATADOG_KEY,
}


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    """AWS on loopback."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables with which boto3 finds it, set in this process, too; it has no secret yet."""
    variables = {
        "AWS_ENDPOINT_URL": moto_url,
        "AWS_REGION": "eu-central-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("secretsmanager")
    for secret in client.list_secrets()["SecretList"]:
        client.delete_secret(SecretId=secret["Name"], ForceDeleteWithoutRecovery=True)
    return variables


def keep(value: Any, name: str = NAME) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    boto3.client("secretsmanager").create_secret(Name=name, SecretString=text)


def found(environment: dict[str, str], **options: Any) -> Credentials:
    return find_credentials(environment, Deadline(20), **options)


def test_the_environment_is_enough() -> None:
    """With all of it in the environment, AWS is not asked."""
    credentials = found(
        WHOLE | {"WANDB_BASE_URL": "http://w", "DD_SITE": "datadoghq.eu"}, datadog=True
    )
    assert credentials.wandb_key.reveal() == WANDB_KEY
    assert (credentials.entity, credentials.project) == (ENTITY, PROJECT)
    assert (credentials.base_url, credentials.datadog_site) == ("http://w", "datadoghq.eu")
    assert credentials.datadog_key is not None


@pytest.mark.parametrize("name", ["WANDB_BASE_URL", "DD_URL"])
@pytest.mark.parametrize(
    "address", ["wandb.example", "http://u:wandb.example[@h", "http://u:wandb.example/@h"]
)
def test_addresses(name: str, address: str) -> None:
    """An address that is none is named; it may carry a password, so it is not shown."""
    with pytest.raises(SettingsError, match=f"{name} cannot be used") as caught:
        found(WHOLE | {name: address})
    assert "wandb.example" not in "".join(traceback.format_exception(caught.value))


def test_a_newline_behind_a_key() -> None:
    """What a file has left behind a key is no part of it; nothing but white space is no key."""
    credentials = found({name: f" {value}\n" for name, value in WHOLE.items()}, datadog=True)
    assert credentials.wandb_key.reveal() == WANDB_KEY
    assert credentials.datadog_key is not None
    assert credentials.datadog_key.reveal() == DATADOG_KEY
    assert found(WHOLE | {"DD_API_KEY": "\n"}).datadog_key is None


def test_the_variables_of_the_manifest(
    aws: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The region is found with what the CronJob sets, and under AWS's other name as well."""
    keep(WHOLE)
    job = list(yaml.safe_load_all(MANIFEST.read_text()))[1]
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    named = {one["name"] for one in container["env"] if one["name"].startswith("AWS_")}
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    with pytest.raises(SecretMissing, match="region"):
        found({})
    for environment in (named, {"AWS_REGION"}):
        given = dict.fromkeys(environment, "eu-central-1")
        assert found(given, datadog=True).wandb_key.reveal() == WANDB_KEY
    for name in named:
        monkeypatch.setenv(name, "eu-central-1")
    assert found({}).wandb_key.reveal() == WANDB_KEY


def test_the_reader_inherits_no_key() -> None:
    """The process that reads from W&B has no key in its environment, but the way to the server."""
    way = {"HTTPS_PROXY": "http://proxy", "SSL_CERT_FILE": "/ca.pem", "WANDB_HTTP_TIMEOUT": "9"}
    steered = {"WANDB_SERVICE": "a socket", "WANDB_MODE": "offline", "AWS_SECRET_ACCESS_KEY": "a"}
    kept = fleet_reader_environment(WHOLE | way | steered, "/home")
    assert way.items() <= kept.items()
    assert not {"WANDB_API_KEY", "DD_API_KEY", *steered} & set(kept)


def test_the_secret_fills_in(aws: dict[str, str]) -> None:
    """What the environment lacks comes from the secret, in either case; the environment wins."""
    keep({name.lower(): value for name, value in WHOLE.items()})
    credentials = found({"WANDB_PROJECT": "mine"}, datadog=True)
    assert credentials.wandb_key.reveal() == WANDB_KEY
    assert (credentials.entity, credentials.project) == (ENTITY, "mine")
    assert credentials.datadog_key is not None
    assert credentials.datadog_key.reveal() == DATADOG_KEY


@pytest.mark.parametrize(
    ("value", "environment", "sentence"),
    [
        (None, {}, "cannot be read .*ResourceNotFound"),
        ("no json: " + WANDB_KEY, {}, "is no JSON object"),
        ("[1]", {}, "is no JSON object"),
        ({"WANDB_ENTITY": "e"}, {"DD_API_KEY": "k"}, "WANDB_API_KEY and WANDB_PROJECT are not set"),
        ({}, WHOLE | {"DD_API_KEY": ""}, "DD_API_KEY is not set, and the secret"),
    ],
)
def test_missing(
    aws: dict[str, str], value: Any, environment: dict[str, str], sentence: str
) -> None:
    """What is to be had nowhere is named, and what to do; a secret's text is not shown."""
    if value is not None:
        keep(value)
    with pytest.raises(SecretMissing, match=sentence) as caught:
        found(environment, datadog=True)
    assert WANDB_KEY not in "".join(traceback.format_exception(caught.value))


def test_the_command_with_a_secret(aws: dict[str, str], tmp_path: Path) -> None:
    """All that the command needs may be in a secret of another name; Datadog's key as well."""
    keep(WHOLE, "other/name")
    with WandbServer(api_key=WANDB_KEY) as server, DatadogServer(DATADOG_KEY) as datadog:
        put_run(server.store, "r")
        addresses = {"WANDB_BASE_URL": server.url, "DD_URL": datadog.url}
        environment = fleet_environment(tmp_path, None, **aws, **addresses)
        ended = run_fleet(environment, "--push", "--secret", "other/name", "--verbose")
        assert ended.returncode == 0, ended.stderr
        assert datadog.series["wandb.runs.completed_24h"]["points"][0]["value"] == 1
        assert WANDB_KEY not in ended.stdout + ended.stderr
        assert DATADOG_KEY not in ended.stdout + ended.stderr


def test_no_credentials_for_aws(tmp_path: Path) -> None:
    """Without a key and without AWS there is one clear sentence, and a code of its own."""
    for region in ({}, {"AWS_REGION": "eu-central-1"}):
        ended = run_fleet(fleet_environment(tmp_path, None, **region))
        assert (ended.returncode, ended.stdout) == (23, "")
        assert "WANDB_API_KEY, WANDB_ENTITY and WANDB_PROJECT are not set" in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_the_key_is_in_no_argument_environment_or_file(aws: dict[str, str], tmp_path: Path) -> None:
    """While W&B is read, no process shows the key, and no file holds it."""
    keep(WHOLE)
    (tmp_path / "tmp").mkdir()
    with WandbServer(api_key=WANDB_KEY) as server:
        server.hang("graphql")
        further = {"WANDB_BASE_URL": server.url, "TMPDIR": str(tmp_path / "tmp")}
        environment = fleet_environment(tmp_path, None, **aws, **further)
        process = start_fleet(environment)
        try:
            server.wait_until(lambda: server.disturbed["graphql"] >= 1)
            seen = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
            assert any("wandb-core" in one.name() for one in seen)
            for one in seen:
                assert WANDB_KEY not in " ".join([*one.cmdline(), *one.environ().values()])
            written = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert written
            assert not [path for path in written if WANDB_KEY.encode() in path.read_bytes()]
            server.behave()
            server.store.projects.add((ENTITY, PROJECT))
            assert process.wait(30) == 0
            assert list((tmp_path / "tmp").iterdir()) == []
        finally:
            process.kill()
            process.communicate()


def test_keys_in_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours that carries a key is told without it, also in its traceback."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"no good: {WANDB_KEY} {DATADOG_KEY}")

    monkeypatch.setattr(cycle, "collect", broken)
    with pytest.raises(FleetError) as caught:
        cycle.run_once(FleetSettings(), [], WHOLE)
    whole = "".join(traceback.format_exception(caught.value))
    assert "RuntimeError: no good: *** ***" in whole
    assert "in broken" in whole
    assert WANDB_KEY not in whole
    assert DATADOG_KEY not in whole


def test_trouble_before_there_are_keys(
    aws: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address of AWS that is none is a missing secret; any other error is told by its name."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(SecretMissing, match="Invalid endpoint"):
        cycle.run_once(FleetSettings(), [], {})

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"no good: {WANDB_KEY}")

    monkeypatch.setattr(cycle, "find_credentials", broken)
    with pytest.raises(FleetError, match="RuntimeError while keys were looked for") as caught:
        cycle.run_once(FleetSettings(), [], {})
    assert WANDB_KEY not in "".join(traceback.format_exception(caught.value))


def test_keys_in_reprs() -> None:
    """Neither repr nor str shows a key, and a key goes through pickle."""
    secret = Secret(WANDB_KEY)
    credentials = Credentials({"WANDB_API_KEY": secret})
    assert WANDB_KEY not in f"{secret} {secret!r} {[secret]} {credentials} {credentials!r}"
    assert pickle.loads(pickle.dumps(secret)).reveal() == WANDB_KEY
    assert credentials.redact(f"a {WANDB_KEY} b") == "a *** b"


def test_keys_as_they_are_quoted() -> None:
    """A key is masked as Python and JSON quote it, and so is what an address has of a login."""
    key = 'new\nline "ü"'
    masked = Credentials(
        {
            "DD_API_KEY": Secret(key),
            "WANDB_BASE_URL": Secret("http://alice:open%20sesame@w:1"),
            "DD_URL": Secret("https://token@dd"),
        }
    )
    for quoted in (key, repr(key), repr(key.encode()), json.dumps(key)):
        assert "line" not in masked.redact(f"no good: {quoted}")
    for text in ("http://alice:open%20sesame@w:1", "'open sesame'", "https://token@dd"):
        shown = masked.redact(text)
        assert "***" in shown
        assert not any(word in shown for word in ("alice", "sesame", "token"))


def test_a_password_in_an_address(tmp_path: Path) -> None:
    """A password in W&B's address is printed nowhere, and an error has one line."""
    for address in (
        "http://user:open-sesame@127.0.0.1:9",
        "https://user:open-sesame@wandb.ai",
        "http://user:open-sesame@api.wandb.ai",
        f"http://user:open-sesame{'x' * 80}@127.0.0.1:9/a b",
    ):
        addressed = WHOLE | {"WANDB_BASE_URL": address}
        environment = fleet_environment(tmp_path, None, **addressed)
        ended = run_fleet(environment, "--verbose", "--limit-s", "3")
        assert ended.returncode
        assert "sesame" not in ended.stdout + ended.stderr
        assert ended.stderr.count("\n") == 1


def test_keys_in_trouble(tmp_path: Path) -> None:
    """Whatever goes wrong on the way, no key is printed under `--verbose`."""
    with WandbServer() as server, DatadogServer("another") as datadog:
        put_run(server.store, "r")
        further = {"WANDB_API_KEY": WANDB_KEY, "DD_API_KEY": DATADOG_KEY, "DD_URL": datadog.url}
        environment = fleet_environment(tmp_path, server, **further)
        ended = [run_fleet(environment, "--verbose", "--push")]
        assert ended[-1].returncode == 24
        server.misbehave("graphql", status=403)
        ended.append(run_fleet(environment, "--verbose", "--push", "--limit-s", "10"))
        server.behave()
        server.store.refused.update(["createdAt", "heartbeatAt", "state", "heartbeat_at"])
        ended.append(run_fleet(environment, "--verbose", "--push"))
        environment["WANDB_BASE_URL"] = f"http://user:{WANDB_KEY}@127.0.0.1:9"
        ended.append(run_fleet(environment, "--verbose", "--push", "--limit-s", "2"))
        assert all(one.returncode for one in ended)
        for one in ended:
            assert WANDB_KEY not in one.stdout + one.stderr
            assert DATADOG_KEY not in one.stdout + one.stderr
