"""`raywb vast list`, `logs` and `destroy`: what is shown is so, and what is gone is gone."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result
from ray_cluster import until
from vast_server import VastServer

from raywb.cli import main
from raywb.launch.vast import instances

if not os.environ.get("CI"):
    pytest.importorskip("vastai", reason="vastai is not installed")

Raywb = Callable[..., Result]
OURS = {"RAYWB_LAUNCH": "a1", "RAYWB_COMMIT": "c" * 40, "RAYWB_RECIPE": "recipes.demo"}


@pytest.fixture
def vast(monkeypatch: pytest.MonkeyPatch) -> Iterator[VastServer]:
    with VastServer() as server:
        monkeypatch.setenv("VAST_URL", server.url)
        monkeypatch.setenv("VAST_API_KEY", server.api_key)
        yield server
        assert server.unexpected == []


@pytest.fixture
def raywb(vast: VastServer) -> Raywb:
    return lambda *words, said="": CliRunner().invoke(main, ["vast", *words], input=said)


def test_a_list_has_what_raywb_launched(raywb: Raywb, vast: VastServer) -> None:
    """More than a page of others is left out, and shown on demand; states change as they do."""
    others = [vast.launch(label="theirs") for _ in range(30)]
    ours = vast.launch(env=OURS, label="mine", status="loading")
    vast.loads = 1
    ours.started_s -= 7200
    (row,) = json.loads(raywb("list", "--json").stdout)
    assert (row["id"], row["state"], row["commit"]) == (ours.id, "loading", "c" * 40)
    assert (row["recipe"], row["gpu"], row["price"]) == ("recipes.demo", "1 x RTX 4090", 0.4)
    assert 2.0 <= row["hours"] < 2.1
    shown = raywb("list").stdout
    assert re.search(rf"{ours.id} +running +1 x RTX 4090 +0.400 +2.0 +0.80 +mine +c{{12}}", shown)
    assert str(others[0].id) not in shown
    everything = json.loads(raywb("list", "--all", "--json").stdout)
    assert [one["id"] for one in everything] == [one.id for one in [*others, ours]]
    vast.instances.clear()
    assert raywb("list").stdout == "no instances that raywb launched\n"


def test_a_log_is_shown_when_it_is_there(raywb: Raywb, vast: VastServer) -> None:
    """Vast.ai names an address whose file comes a little later; only its last lines are asked."""
    instance = vast.launch(env=OURS)
    instance.log = "one\ntwo\nthree\n"
    vast.log_waits = 1
    assert raywb("logs", "--tail", "2", str(instance.id)).stdout == "two\nthree\n"
    gone = raywb("logs", "77")
    assert (gone.exit_code, gone.stdout) == (34, "")
    vast.misbehave("logs", 500)
    assert raywb("logs", str(instance.id)).exit_code == 33


def test_a_log_is_followed_to_the_instances_end(raywb: Raywb, vast: VastServer) -> None:
    """Every line once, in order, also when older ones have fallen out; it ends by itself."""
    instance = vast.launch(env=OURS)
    instance.log = "".join(f"line {n}\n" for n in range(8))
    results: list[Result] = []
    words = ("logs", "--follow", "--tail", "5", "--pause-s", "0.1", str(instance.id))
    thread = threading.Thread(target=lambda: results.append(raywb(*words)))
    thread.start()

    def looked() -> int:
        return len(vast.of_kind("result"))

    for n in range(8, 11):
        before = looked()
        until("a look at the log", lambda before=before: looked() >= before + 2)
        instance.log += f"line {n}\nline {n}b\n"
    before = looked()
    until("a look at the log", lambda: looked() >= before + 2)
    del vast.instances[instance.id]
    thread.join(20)
    assert results[0].exit_code == 0
    lines = [f"line {n}" for n in range(3, 8)]
    lines += [f"line {n}{letter}" for n in range(8, 11) for letter in ("", "b")]
    assert results[0].stdout.splitlines() == [*lines, f"[instance {instance.id} is gone]"]


def test_lines_that_were_missed_are_not_passed_over() -> None:
    """Where nothing overlaps, that is said."""
    assert instances._new_lines(["a\n", "b\n"], ["b\n", "c\n"]) == ["c\n"]
    assert instances._new_lines(["a\n", "a\n"], ["a\n", "a\n", "a\n"]) == ["a\n"]
    assert instances._new_lines(["a\n"], ["x\n"]) == ["[lines are missing here]\n", "x\n"]


def test_an_instance_is_gone_when_vast_shows_it_no_more(raywb: Raywb, vast: VastServer) -> None:
    """What it costs is shown and confirmed; success waits until the instance is gone."""
    instance = vast.launch(env=OURS)
    refused = raywb("destroy", str(instance.id), said="n\n")
    assert refused.exit_code == 1
    assert f"instance {instance.id}: running, 1 x RTX 4090, 0.400 $/h" in refused.stderr
    assert vast.of_kind("destroy") == []
    vast.lingers = 1
    done = raywb("destroy", str(instance.id), said="y\n")
    assert (done.exit_code, vast.instances) == (0, {})
    assert done.stdout == f"instance {instance.id} is gone\n"
    again = raywb("destroy", "--yes", str(instance.id))
    assert (again.exit_code, again.stdout) == (34, "")


@pytest.mark.parametrize(
    ("kind", "fault", "code", "says"),
    [
        ("destroy", 401, 31, "does not let this key destroy"),
        ("destroy", 500, 33, "did not destroy instance"),
        ("destroy", 404, 34, "knows no instance"),
        ("destroy", "refuse", 35, "refused to destroy .* goes on costing: as the test"),
        ("destroy", "pretend", 35, "still shows it after 0.2 s"),
        ("destroy", "nonsense", 33, "client cannot read"),
        ("destroy", "hang", 33, "did not answer in time"),
        ("show", 500, 33, "did not show instance"),
    ],
)
def test_an_instance_that_is_still_there_is_no_success(
    raywb: Raywb,
    vast: VastServer,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    fault: int | str,
    code: int,
    says: str,
) -> None:
    """Each trouble has its own sentence and exit code, and nothing is said to be gone."""
    monkeypatch.setattr("raywb.launch.vast.client.REQUEST_TIMEOUT_S", 0.3)
    instance = vast.launch(env=OURS)
    vast.misbehave(kind, fault)
    done = raywb("destroy", "--yes", "--timeout-s", "0.2", str(instance.id))
    assert done.exit_code == code, done.output
    assert re.search(says, done.stderr), done.stderr
    assert done.stdout == ""
    assert instance.id in vast.instances
