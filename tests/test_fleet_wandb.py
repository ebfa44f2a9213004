"""The collector reads a project through the real W&B client, and no more of it than it must."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fleet_runs import ENTITY, HOUR_S, PROJECT, fleet_environment, put_run, run_fleet
from wandb_client import API_KEY, run_client, start_client
from wandb_server import WandbServer

from raywb.fleet import FleetSettings, run_once
from raywb.fleet.reading import Page, Reader, ReadRequest, Refused
from raywb.fleet.runs import Window, iso_time

MAIN = "github.sky.main.0a1b2c.tiny.2026-11-20"
SPS = "wandb.push_to_main.overview.sps"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer(entity=ENTITY) as server:
        yield server


def collected(server: WandbServer, home: Path, *arguments: str) -> dict[str, Any]:
    """What `raywb fleet --json` prints."""
    ended = run_fleet(fleet_environment(home, server), "--json", *arguments)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def by_name(answer: dict[str, Any]) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in answer["metrics"]}


#: Leaves its first run running, and writes those that it is told.
REAL_RUNS = """
    import sys, wandb

    def begin(name):
        config = {"compute.gpu_count": 4, "compute.cpu_count": 8, "lr": 0.1}
        return wandb.init(
            entity="robots", project="sky", name=name, config=config, reinit="create_new"
        )

    running = begin("running")
    running.log({"x": 1})
    for name, exit_code in (("%s", 0), ("github.sky.pr3.0a1b.x", 1)):
        run = begin(name)
        for i in range(3):
            run.log({"overview/sps": 100.0 + i, "timing_per_epoch/sps": float("nan"), "x": i})
        run.finish(exit_code=exit_code)
    print("written", flush=True)
    sys.stdin.readline()
"""

REAL_SWEEP = """
    import os, wandb
    # As W&B's agent has it; the client then goes by nothing else.
    os.environ |= {"WANDB_SWEEP_ID": "s3", "WANDB_PROJECT": "sky"}
    wandb.init(entity="robots", name="tuned").finish()
"""


def test_runs_of_the_real_client(server: WandbServer, tmp_path: Path) -> None:
    """Runs that W&B's client wrote are found with state, GPUs, throughput and sweep."""
    client = start_client(REAL_RUNS % MAIN, tmp_path, server.url)
    try:
        assert run_client(REAL_SWEEP, tmp_path, server.url).returncode == 0
        assert client.stdout is not None
        assert client.stdout.readline() == "written\n"
        answer = collected(server, tmp_path, "--verbose")
    finally:
        client.kill()
        client.communicate()
    found = by_name(answer)
    assert found["wandb.runs.active"] == 1
    assert found["wandb.runs.completed_24h"] == 2
    assert found["wandb.runs.failed_24h"] == 1
    assert found["wandb.runs.total_recent"] == 4
    assert found["wandb.push_to_main.success_rate_pct"] == 50.0
    assert found[SPS] == 102.0
    assert "wandb.push_to_main.timing_per_epoch.sps" not in found
    assert found["wandb.sweep.runs_completed_24h"] == 1
    assert answer["details"]["recorded_runs"] == 2
    assert answer["details"]["assumed_runs"] == 1
    assert answer["details"]["unusable"] == {"timing_per_epoch/sps": 2}
    assert server.errors == []


def test_the_shape_of_the_answer(server: WandbServer, tmp_path: Path) -> None:
    """`--json` prints metrics with name and value, and the window; nothing is sent anywhere."""
    put_run(server.store, "r", created_ago_s=30 * HOUR_S, heartbeat_ago_s=HOUR_S)
    answer = collected(server, tmp_path, "--window-hours", "2")
    assert set(answer) == {"metrics", "window"}
    assert all(set(metric) == {"name", "value"} for metric in answer["metrics"])
    assert answer["window"]["hours"] == 2
    assert by_name(answer)["wandb.runs.completed_24h"] == 1
    assert set(server.requests) == {"graphql", "graphql:Viewer", "graphql:RaywbFleet"}


def test_from_python(server: WandbServer, tmp_path: Path) -> None:
    """The same without the command: settings in, report out."""
    put_run(server.store, "r")
    put_run(server.store, "s", created_ago_s=7 * HOUR_S, heartbeat_ago_s=6 * HOUR_S)
    environment = fleet_environment(tmp_path, server)
    outcome = run_once(FleetSettings(window_hours=3), [], environment)
    assert outcome.complete
    assert outcome.report.runs == 1
    assert [one.value for one in outcome.report.metrics][:4] == [0, 1, 0, 1]


def test_an_empty_project(server: WandbServer, tmp_path: Path) -> None:
    """A project without a run is no error: its counts are 0."""
    server.store.projects.add((ENTITY, PROJECT))
    found = by_name(collected(server, tmp_path))
    assert found["wandb.runs.total_recent"] == 0
    assert len(found) == 11


def seed(server: WandbServer) -> dict[str, int]:
    """Runs in and around the window; returns what must be counted of them."""
    store = server.store
    day_s = 24 * HOUR_S
    put_run(store, "new", heartbeat_ago_s=HOUR_S)
    put_run(store, "ended in it", created_ago_s=3 * day_s, heartbeat_ago_s=HOUR_S)
    put_run(store, "still runs", state="running", created_ago_s=9 * day_s, heartbeat_ago_s=5)
    put_run(store, "silent", state="running", created_ago_s=9 * day_s, heartbeat_ago_s=5 * day_s)
    put_run(store, "failed", state="failed")
    for index in range(40):
        ago_s = (2 + index) * day_s
        put_run(store, f"old {index}", created_ago_s=ago_s, heartbeat_ago_s=ago_s - HOUR_S)
    return {"wandb.runs.completed_24h": 2, "wandb.runs.active": 2, "wandb.runs.failed_24h": 1}


@pytest.mark.parametrize(
    ("refused", "missing", "noted"),
    [
        (["$or"], [], ["one by one"]),
        (["createdAt"], [], ["by createdAt"]),
        (["heartbeatAt"], [], ["by heartbeatAt"]),
        (["heartbeatAt", "createdAt"], [], ["by heartbeatAt", "by createdAt"]),
        (
            ["heartbeatAt", "heartbeat_at"],
            ["runs that began before the window and ended in it"],
            ["by heartbeatAt", "order by heartbeat"],
        ),
        (
            ["state"],
            ["runs that still run and were not heard of in the window"],
            ["by state"],
        ),
    ],
)
def test_refused_filters(
    server: WandbServer, tmp_path: Path, refused: list[str], missing: list[str], noted: list[str]
) -> None:
    """A filter that the server refuses is told, and done without; what is then missing, too."""
    expected = seed(server)
    server.store.refused.update(refused)
    ended = run_fleet(fleet_environment(tmp_path, server), "--json", "--verbose")
    answer = json.loads(ended.stdout)
    found = by_name(answer)
    expected["wandb.runs.completed_24h"] -= "heartbeat_at" in refused
    expected["wandb.runs.active"] -= "state" in refused
    assert {name: found[name] for name in expected} == expected
    assert answer["read"]["incomplete"] == missing
    assert all(any(text in note for note in answer["read"]["notes"]) for text in noted)
    assert ended.returncode == (24 if missing else 0)
    assert all(text in ended.stderr for text in missing)


def test_a_server_that_refuses_everything(server: WandbServer, tmp_path: Path) -> None:
    """Without any way to ask for recent runs there is an error, not the whole history."""
    seed(server)
    orders = ["heartbeat_at", "created_at"]
    server.store.refused.update(["createdAt", "heartbeatAt", "state", *orders])
    ended = run_fleet(fleet_environment(tmp_path, server))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "refuses to search for runs at all" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_server_that_passes_over_filters(server: WandbServer, tmp_path: Path) -> None:
    """A server that ignores the filters is noticed; its history is not read."""
    seed(server)
    for index in range(1000):
        put_run(server.store, f"ancient {index}", created_ago_s=1e7, heartbeat_ago_s=9e6)
    server.store.passed_over.add("$or")
    ended = run_fleet(fleet_environment(tmp_path, server), "--json", "--verbose")
    assert ended.returncode == 24
    answer = json.loads(ended.stdout)
    assert by_name(answer)["wandb.runs.failed_24h"] == 1
    assert any("passes over the filters" in note for note in answer["read"]["notes"])
    assert server.requests["graphql:RaywbFleet"] <= 4


def test_a_server_without_selection_of_keys(server: WandbServer, tmp_path: Path) -> None:
    """A server that hands out only whole summaries is read all the same."""
    put_run(server.store, "r", name=MAIN, summary={"overview/sps": 5.0, "big": "x" * 1000})
    server.store.knows_keys = False
    answer = collected(server, tmp_path, "--verbose")
    assert by_name(answer)[SPS] == 5.0
    assert any("cannot hand out parts" in note for note in answer["read"]["notes"])


def test_a_crashed_run_with_a_text_for_a_summary(server: WandbServer, tmp_path: Path) -> None:
    """A summary that arrives as a JSON text in a JSON text counts."""
    run = put_run(server.store, "r", name=MAIN, state="crashed", summary={"overview/sps": 8.0})
    run.summary_in_text = True
    assert by_name(collected(server, tmp_path))[SPS] == 8.0


def test_main_is_compared_beyond_the_window(server: WandbServer, tmp_path: Path) -> None:
    """With `--verbose`, one further request finds the runs of main that came before the window."""
    for days in range(2, 9):
        put_run(
            server.store,
            f"m{days}",
            name=f"{MAIN}.{days}",
            created_ago_s=days * 24 * HOUR_S,
            heartbeat_ago_s=days * 24 * HOUR_S - HOUR_S,
            summary={"overview/sps": 100.0},
        )
    put_run(server.store, "new", name=MAIN, summary={"overview/sps": 80.0})
    (found,) = collected(server, tmp_path, "--verbose")["details"]["throughput"]
    assert (found["latest"], found["baseline"], found["baseline_runs"]) == (80.0, 100.0, 7)
    assert found["regression"] is True
    assert server.requests["graphql:RaywbFleet"] == 2
    shown = run_fleet(fleet_environment(tmp_path, server), "--verbose").stdout
    assert "-20.0 % against the median 100.00" in shown
    assert "REGRESSION" in shown


@pytest.mark.parametrize("ending", ["trickles", "fails", "forbids"])
def test_main_without_its_earlier_runs(server: WandbServer, tmp_path: Path, ending: str) -> None:
    """What goes wrong with main's earlier runs costs no metric, and leaves time to the outlets."""
    put_run(server.store, "r", name=MAIN, summary={"overview/sps": 5.0})
    answered = server._schema.roots

    def roots(kind: str) -> Any:
        asked = server.requests["graphql:RaywbFleet"]
        if ending == "trickles" and asked == 2:
            server.trickle("graphql")
        elif ending != "trickles" and asked == 1:  # the next one is the baseline's
            server.misbehave("graphql", status=500 if ending == "fails" else 403)
        return answered(kind)

    server._schema.roots = roots  # type: ignore[method-assign]
    arguments = ("--json", "--limit-s", "6", "--openmetrics", "out.prom")
    answer = collected(server, tmp_path, "--verbose", *arguments)
    assert by_name(answer)[SPS] == 5.0
    assert "main's earlier runs did not come" in "".join(answer["read"]["notes"])
    assert (tmp_path / "out.prom").exists()
    server.behave()


@pytest.mark.parametrize("ending", ["trickles", "hangs", "fails", "refuses connections"])
def test_the_time_limit(server: WandbServer, tmp_path: Path, ending: str) -> None:
    """The limit holds whatever the server does, byte by byte too, and nothing is left behind."""
    put_run(server.store, "r")
    match ending:
        case "trickles":
            server.trickle("graphql")
        case "hangs":
            server.hang("graphql")
        case "fails":
            server.misbehave("graphql", status=500)
        case _:
            server.refuse()
    began = time.monotonic()
    ended = run_fleet(fleet_environment(tmp_path, server), "--limit-s", "2")
    took_s = time.monotonic() - began
    assert (ended.returncode, ended.stdout) == (22, ""), ended.stderr
    assert 2 <= took_s < 6
    assert ended.stderr.count("\n") == 1
    assert "within 2 s" in ended.stderr
    server.behave()


def test_a_trickle_in_the_middle(server: WandbServer, tmp_path: Path) -> None:
    """What a page that never ends leaves open is told; half a window is no result."""
    for index in range(250):
        put_run(server.store, f"r{index}")
    answered = server._schema.roots

    def roots(kind: str) -> Any:
        if server.requests["graphql:RaywbFleet"] == 2:
            server.trickle("graphql")
        return answered(kind)

    server._schema.roots = roots  # type: ignore[method-assign]
    ended = run_fleet(fleet_environment(tmp_path, server), "--limit-s", "6")
    assert (ended.returncode, ended.stdout) == (22, "")
    assert "200 runs on 1 page had come" in ended.stderr
    server.behave()


def test_wrong_key(tmp_path: Path) -> None:
    """A key that the server does not accept has its own exit code, and is not shown."""
    with WandbServer(entity=ENTITY, api_key="f" * 40) as server:
        for key in (API_KEY, "tooshort"):
            environment = fleet_environment(tmp_path, server, WANDB_API_KEY=key)
            ended = run_fleet(environment, "--verbose")
            assert (ended.returncode, ended.stdout) == (20, "")
            assert "does not accept the key" in ended.stderr
            assert key not in ended.stderr


@pytest.mark.parametrize(("status", "code"), [(403, 20), (404, 1), (400, 1)])
def test_a_login_that_fails(server: WandbServer, tmp_path: Path, status: int, code: int) -> None:
    """W&B's client blames the key for every failed login; only what the server says counts."""
    server.misbehave("graphql", status=status)
    ended = run_fleet(fleet_environment(tmp_path, server))
    assert (ended.returncode, ended.stdout) == (code, "")
    assert str(status) in ended.stderr
    assert ("does not accept the key" in ended.stderr) == (code == 20)


@pytest.mark.parametrize(("status", "code"), [(401, 20), (403, 21), (404, 21), (400, 1)])
def test_pages_that_fail(server: WandbServer, tmp_path: Path, status: int, code: int) -> None:
    """Behind a good login, a key may be withdrawn, or not be allowed to see the project."""
    put_run(server.store, "r")
    answered = server._schema.roots

    def roots(kind: str) -> Any:
        server.misbehave("graphql", status=status)
        return answered(kind)

    server._schema.roots = roots  # type: ignore[method-assign]
    ended = run_fleet(fleet_environment(tmp_path, server))
    assert (ended.returncode, ended.stdout) == (code, "")
    assert str(status) in ended.stderr


def test_unknown_project(server: WandbServer, tmp_path: Path) -> None:
    """A project that is not there has its own exit code, and is named."""
    ended = run_fleet(fleet_environment(tmp_path, server, WANDB_PROJECT="nowhere"))
    assert (ended.returncode, ended.stdout) == (21, "")
    assert f"no project {ENTITY}/nowhere" in ended.stderr


NOW_S = 1_800_000_000.0
WINDOW = Window.until(NOW_S, 24)


def node(name: str, begun_h: float, heard_h: float | None, state: str = "finished") -> Any:
    """A run as GraphQL gives it, its times in hours from now."""
    heard = None if heard_h is None else iso_time(NOW_S + heard_h * HOUR_S)
    begun = iso_time(NOW_S + begun_h * HOUR_S)
    return {"name": name, "state": state, "createdAt": begun, "heartbeatAt": heard}


def reader_of(pages: Callable[[Mapping[str, Any], str], Iterable[Page]]) -> Reader:
    """A reader of a server that answers filters and order with these pages."""
    request = ReadRequest("key", "http://w", ENTITY, PROJECT, WINDOW, 200, 10.0)
    return Reader(
        lambda _, filters, order, __: iter(pages(filters, order)), request, lambda _: None
    )


@pytest.mark.parametrize("order_refused", [False, True])
def test_a_pending_run_without_its_filter(order_refused: bool) -> None:
    """A run that waits and was never heard of is found newest first, or told to be missing."""
    asked: list[str] = []
    history = [
        [node("waits", -1, None, "pending"), node("new", -3, -2)],
        [node("newish", -23, -22), node("old", -30, -29)],
        [node("older", -40, -39)],
    ]

    def pages(filters: Mapping[str, Any], order: str) -> Iterator[Page]:
        if "createdAt" in str(filters) or (order_refused and not filters):
            raise Refused("no")
        for page in [[]] if filters else history:
            asked.append(order)
            yield page

    reader = reader_of(pages)
    found = {run.id for run in reader.read_window()}
    if order_refused:
        assert found == set()
        assert "not heard of since" in " ".join(reader.incomplete)
    else:
        assert found == {"waits", "new", "newish"}
        assert reader.incomplete == []
        assert len(asked) == 2 + 2  # one each for two filters, and no page beyond the window


def test_one_page_of_others_is_no_proof() -> None:
    """Filters count as passed over after two pages in a row whose times lie before the window."""
    outside, inside = [node("old", -40, -39)], [node("new", -3, -2)]
    undated = [{"name": "u", "state": "pending", "createdAt": "?", "heartbeatAt": None}]
    reader = reader_of(lambda *_: [outside, inside, outside, undated, outside, [node("n", -9, -8)]])
    assert [run.id for run in reader.read_window()] == ["new", "n"]
    assert reader.incomplete == []
    reader = reader_of(lambda *_: [inside, outside, outside, [node("n", -9, -8)]])
    assert [run.id for run in reader.read_window()] == ["new"]
    assert reader.incomplete == ["runs that began long ago and still ran in the window"]


#: What one writes with W&B's public API, without and with its filters.
LOOP = """
    import json, sys, time, wandb
    since, filtered = sys.argv[1:]
    keys = ("overview/sps", "timing_per_epoch/sps")
    or_else = [{"createdAt": {"$gte": since}}, {"heartbeatAt": {"$gte": since}}]
    filters = {"$or": [*or_else, {"state": "running"}]} if filtered else None
    began = time.monotonic()
    api = wandb.Api()
    found = sps = 0
    for run in api.runs("robots/sky", filters=filters):
        if run.created_at < since and run.state != "running" and run.heartbeat_at < since:
            continue
        found += 1
        sps += any(key in run.summary for key in keys)
        run.config.get("compute.gpu_count")
    print(json.dumps([found, sps, time.monotonic() - began]))
"""

ONE_RUN = """
    import wandb
    with wandb.init(entity="robots", project="sky", config={"compute.gpu_count": 2}) as run:
        run.log({"overview/sps": 50.0})
"""


def loop(server: WandbServer, home: Path, since: str, *, filtered: bool) -> float:
    """Look at every recent run with the public API; returns how long it took, in seconds."""
    given = (since, "yes" if filtered else "")
    ended = run_client(LOOP, home, server.url, *given, timeout_s=280.0)
    assert ended.returncode == 0, ended.stderr
    found, with_sps, took_s = json.loads(ended.stdout)
    assert (found, with_sps) == (300, 300)
    return took_s


def test_few_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 26,000 runs the 300 recent ones cost requests; the naive loop takes 10 times longer."""
    table: list[tuple[str, int, int, float]] = []
    with WandbServer(entity=ENTITY) as server:
        for index in range(26_000 - 300):
            ago_s = 3 * 24 * HOUR_S + 600 * index
            put_run(server.store, f"old{index}", created_ago_s=ago_s, heartbeat_ago_s=ago_s - 60)
        assert run_client(ONE_RUN, tmp_path, server.url).returncode == 0
        recent = 1
        for wanted in (100, 300, 300):
            for index in range(recent, wanted):
                put_run(server.store, f"new{index}", name=MAIN, summary={"overview/sps": 7.0})
            recent = wanted
            server.requests.clear()
            answer = collected(server, tmp_path, "--verbose")
            assert by_name(answer)["wandb.runs.total_recent"] == wanted
            took_s = answer["read"]["seconds"]
            table.append(("raywb fleet", wanted, server.requests["graphql"], took_s))
        # One for the login, one for main's earlier runs, and a page for each 200.
        assert [requests for _, _, requests, _ in table] == [3, 4, 4]
        for name, filtered in (("api.runs(filters)", True), ("api.runs()", False)):
            server.requests.clear()
            took_s = loop(server, tmp_path, answer["window"]["start"], filtered=filtered)
            table.append((name, 300, server.requests["graphql"], took_s))
    with capsys.disabled():
        print()
        for name, count, requests, took_s in table:
            print(f"{name:18} {count:4} recent of 26,000 {requests:5} requests {took_s:7.2f} s")
    ours_s = min(took_s for name, count, _, took_s in table[:3] if count == 300)
    assert table[-1][-1] > 10 * ours_s
