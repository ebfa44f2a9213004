"""The page's API: a live service and a directory give the values of the outbox, to the entitled."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from local_service import LocalService, local_service
from page_server import Server, serving

from raywb.cli import main
from raywb.errors import SettingsError
from raywb.reports import PageAddress
from raywb.service.ingest import STRANGER_S
from raywb.view.page.application import MAX_KEYS
from raywb.view.page.command import addresses

ROWS = 300


def log_rows(service: LocalService) -> None:
    client = service.client("training/a")
    for step in range(ROWS):
        client.log({"loss": 1 / (step + 1), "note": "x"}, step=step)
    other = service.client("training/b")
    other.log({"loss": float("nan")}, step=1)
    other.log({"loss": 2.5}, step=0)
    assert client.flush(10.0)
    assert other.flush(10.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """A service with a run, in which two stages have logged."""
    directory = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(directory))
        patch.setenv("RAYWB_JOURNAL_DIR", str(directory / "journals"))
        patch.setenv("WANDB_API_KEY", "k" * 40)
        with local_service(directory) as local:
            local.up(ui="network")
            local.start(ui="network")
            log_rows(local)
            local.wait_for(lambda status: status.outbox_rows == ROWS + 2)
            yield local


@pytest.fixture(scope="module")
def live(service: LocalService) -> Server:
    """Its page on loopback."""
    assert service.service is not None
    port = service.service.page_address().loopback_port
    assert port is not None
    return Server(port)


@pytest.fixture(scope="module")
def left(service: LocalService) -> Iterator[tuple[Server, str]]:
    """The page of the same directory without the service, from a process of its own."""
    command = [sys.executable, "-m", "raywb", "ui", str(service.directory), "--no-open"]
    with serving([*command, "--port", "0"]) as found:
        yield found


@pytest.fixture(params=["live", "left"])
def server(request: pytest.FixtureRequest) -> Server:
    """Both of them: they answer alike."""
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, Server) else found[0]


def test_values_are_those_that_were_logged(server: Server) -> None:
    """Overview, series and points tell what was logged, on each stage's own axis."""
    overview = server.wait_for(
        "/api/overview", lambda found: found["status"]["outbox_rows"] == ROWS + 2
    )
    (run,) = overview["runs"]
    assert run["number"] == overview["run"] == 1
    assert (run["id"], run["mode"], run["group"], run["stage"]) == (
        "run00001",
        "offline",
        "group",
        None,
    )
    assert run["rows"] == ROWS + 2
    assert run["state"] == "running"
    stages = {stage["stage"]: stage for stage in overview["status"]["live"]["stages"]}
    assert stages["training/a"]["step"] == ROWS - 1
    listed = server.wait_for("/api/series?run=1", lambda found: found["rows_read"] == ROWS + 2)
    series = {one["key"]: one for one in listed["series"]}
    assert "training/a/note" not in series
    assert series["training/a/loss"] == {
        "key": "training/a/loss",
        "namespace": "training/a",
        "axis": "training/a/step",
        "points": ROWS,
        "last": 1 / ROWS,
        "min": 1 / ROWS,
        "max": 1.0,
        "time_s": series["training/a/step"]["time_s"],
    }
    asked = "/api/points?run=1&key=training/a/loss&key=training/b/loss&key=nothing"
    points = server.get(asked)["series"]
    assert set(points) == {"training/a/loss", "training/b/loss"}
    assert points["training/a/loss"]["x"] == [float(step) for step in range(ROWS)]
    assert points["training/a/loss"]["mean"] == [1 / (step + 1) for step in range(ROWS)]
    assert points["training/b/loss"]["x"] == [0.0, 1.0]
    assert points["training/b/loss"]["mean"] == [2.5, None]
    thinned = server.get(asked + "&points=10&from=100&to=199")["series"]["training/a/loss"]
    assert thinned["points"] == 100
    assert len(thinned["x"]) == 10
    assert thinned["last"] == 1 / 200
    # The newest in the file is not the one at the greatest step.
    assert points["training/b/loss"]["last"] is None
    assert (max(thinned["max"]), min(thinned["min"])) == (1 / 101, 1 / 200)


def test_events_bring_what_is_new(service: LocalService, server: Server) -> None:
    """The overview comes at once, and again when rows have come."""
    with server.events() as events:
        before = next(events)["status"]["outbox_rows"]
        client = service.client("more")
        client.log({"x": 1})
        assert client.flush(10.0)
        for overview in events:
            if overview["status"]["outbox_rows"] > before:
                break
    number = server.get("/api/overview")["status"]["outbox_rows"]
    key = "/api/points?run=1&key=more/x&x=row"
    found = server.wait_for(key, lambda answer: answer["rows_read"] >= number)
    assert found["series"]["more/x"]["x"][-1] >= ROWS + 2


def test_the_page_and_its_files_are_served(server: Server) -> None:
    """The page may load its own scripts and styles and nothing else; a HEAD has no body."""
    status, headers, body = server.ask("/")
    assert (status, headers["Content-Type"].split(";")[0]) == (200, "text/html")
    assert b"<html" in body
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in headers
    assert server.ask("/static/index.html")[2] == body
    assert server.ask("/api/overview", "HEAD")[2] == b""


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/static/../application.py", 404),
        ("/static/%2e%2e/application.py", 404),
        ("/static/..%2f..%2fcli.py", 404),
        ("/static//etc/passwd", 404),
        ("/static/%00", 404),
        ("/api/nothing", 404),
        ("/api/series", 400),
        ("/api/series?run=-1", 400),
        ("/api/series?run=x", 400),
        ("/api/series?run=99999999999999999999", 400),
        ("/api/series?run=300000000000", 404),
        ("/api/points?run=1", 400),
        ("/api/points?run=1&key=a&points=0", 400),
        ("/api/points?run=1&key=a&points=5001", 400),
        ("/api/points?run=1&points=5000" + "&key=a" * 21, 400),
        ("/api/points?run=1&key=a&x=nothing", 400),
        ("/api/points?run=1&key=a&from=nan", 400),
        ("/api/points?run=1&key=" + "k" * 2000, 400),
        ("/api/points?run=1" + "&key=a" * (MAX_KEYS + 1), 400),
        ("/api/points?run=1&key=" + "k" * 20_000, 400),
    ],
)
def test_what_is_asked_wrongly_is_refused(server: Server, path: str, status: int) -> None:
    """Tricks with paths, unknown runs and queries without bounds get an error, and no more."""
    assert server.ask(path)[0] == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(server: Server, method: str) -> None:
    """Only GET and HEAD are answered."""
    assert server.ask("/api/overview", method)[0] == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "10.0.0.1", "", "a:b:c"]
)
def test_another_sites_name_is_refused_on_loopback(server: Server, host: str) -> None:
    """A page of another site, whose name leads to this machine, learns nothing."""
    assert server.ask("/api/overview", Host=host)[0] in (400, 403)
    assert server.ask("/api/overview", Host="localhost:1")[0] == 200
    assert server.ask("/api/overview", Host="[::1]")[0] == 200


def test_no_answer_holds_a_secret(service: LocalService, server: Server) -> None:
    """Neither the sources' token, nor the viewers', nor W&B's key is in any answer."""
    assert service.service is not None
    token = service.endpoint.token
    view = service.service.page_address().token
    assert view is not None
    assert view != token
    paths = ["/", "/api/overview", "/api/series?run=1", "/api/points?run=1&key=training/a/loss"]
    for path in paths:
        _, headers, body = server.ask(path)
        everything = body + str(headers).encode()
        assert not [secret for secret in (token, view, "k" * 40) if secret.encode() in everything]


def test_by_another_address_a_token_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown once it becomes a cookie; the sources' own token opens nothing, and a wrong one.

    A connection on which nothing is shown is a problem of the run.
    """
    monkeypatch.setattr("raywb.service.ingest.STRANGER_S", 0.1)
    ours = own_address()
    with local_service(tmp_path) as local:
        local.up(ui="network")
        boot = local.service
        assert boot is not None
        assert boot._parts is not None
        boot._loop.call(_listen_elsewhere(boot, ours), 10)
        address = boot.page_address()
        outside = Server(address.loopback_port or 0, ours)
        silent = socket.create_connection((ours, outside.port))
        assert "error" in outside.get("/api/overview", 401)
        bearer = f"Bearer {address.token}"
        assert outside.get("/api/overview", Authorization=bearer)["live"]
        for wrong in (local.endpoint.token, "x" * 64, "ä", ""):
            assert outside.ask("/api/overview?token=" + wrong.replace("ä", "%c3%a4"))[0] == 401
        status, headers, _ = outside.ask(f"/?token={address.token}")
        assert (status, headers["Location"]) == (303, "./")
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite" in cookie
        assert outside.get("/api/overview", Cookie=cookie.split(";")[0])["live"]
        # With the default nobody outside gets anything, whatever he shows.
        local.start(ui="loopback")
        assert outside.ask("/api/overview", Authorization=bearer)[0] == 403
        assert Server(outside.port).ask("/api/overview")[0] == 200
        with silent:
            local.wait_for(lambda status: "no token in time" in " ".join(status.problems))


async def _listen_elsewhere(service: Any, host: str) -> None:
    """On one machine, this stands for a listener on the node's own address."""
    from raywb.service.ingest import _listen_on

    runner = service._parts.ingest._runner
    await _listen_on(runner, host, service._parts.state.port)


def own_address() -> str:
    """An address of this machine that is no loopback's."""
    for addresses_of in psutil.net_if_addrs().values():
        for one in addresses_of:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                return str(one.address)
    pytest.skip("this machine has no address but loopback's")


def test_a_page_may_be_switched_off(tmp_path: Path) -> None:
    """With ui=off nobody is answered, and whoever looks for the page is told."""
    with local_service(tmp_path) as local:
        local.up(ui="off")
        assert local.service is not None
        page = local.service.page_address()
        assert Server(page.loopback_port or 0).ask("/api/overview")[0] == 404
        with pytest.raises(SettingsError, match="switched off"):
            addresses(page, page.hostname)


def test_pages_stay_and_strangers_go(
    service: LocalService, live: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doorman closes who shows nothing, and leaves a page that listens alone."""
    monkeypatch.setattr("raywb.service.ingest.STRANGER_S", 1.0)
    assert STRANGER_S > 1.0
    with live.events() as events, socket.create_connection(("127.0.0.1", live.port)) as silent:
        next(events)
        silent.settimeout(10.0)
        with contextlib.suppress(ConnectionError):
            assert silent.recv(1) == b""
        # Browsers open connections in advance: that is no problem of the run.
        assert not [one for one in service.status().problems if "no token" in one]
        client = service.client("later")
        client.log({"x": 1})
        assert client.flush(10.0)
        while next(events)["status"]["outbox_rows"] < ROWS + 4:
            pass


def test_the_directory_is_left_as_it_is(service: LocalService, left: tuple[Server, str]) -> None:
    """What is served from files says so, and neither changes a file nor makes one."""
    server, said = left
    assert str(service.directory) in said

    def files() -> dict[Path, bytes]:
        kept = [path for path in service.directory.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in kept if "wandb" not in path.parts}

    before = files()
    server.get("/api/overview")
    server.get("/api/series?run=1")
    after = files()
    assert after.keys() == before.keys()
    # The service is still there: its logs may have grown, and nothing else.
    for path, content in after.items():
        assert content[: len(before[path])] == before[path], path
        assert path.suffix == ".log" or content == before[path], path
    assert any(path.parent.name == "outbox" for path in before)


def test_several_runs_directories_are_listed(service: LocalService, tmp_path: Path) -> None:
    """The newest is shown first; each has numbers of its own, and can be asked for its series."""
    for name, age_s in (("old", 1000), ("new", 0)):
        (tmp_path / name / "outbox").mkdir(parents=True)
        for path in [*service.directory.glob("service.json"), *service.directory.glob("outbox/*")]:
            copy = tmp_path / name / path.relative_to(service.directory)
            copy.write_bytes(path.read_bytes())
        os.utime(tmp_path / name / "service.json", (time.time() - age_s,) * 2)
    command = [sys.executable, "-m", "raywb", "ui", str(tmp_path), "--port", "0", "--no-open"]
    with serving(command) as (server, said):
        assert str(tmp_path / "new") in said
        overview = server.get("/api/overview")
        assert len({run["number"] for run in overview["runs"]}) == 2
        assert overview["run"] == overview["runs"][0]["number"]
        assert {run["state"] for run in overview["runs"]} == {"unfinished"}
        assert "nobody ended this run" in overview["status"]["problems"][0]
        assert [run["rows"] for run in overview["runs"]][1] is None
        with open(tmp_path / "old" / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            server.wait_for("/api/overview", lambda one: one["runs"][1]["state"] == "running")
        server.wait_for("/api/overview", lambda one: one["runs"][1]["state"] == "unfinished")
        for run in overview["runs"]:
            path = f"/api/series?run={run['number']}"
            found = server.wait_for(path, lambda answer: answer["rows_read"] >= ROWS)
            assert found["run"] == run["number"]
            assert "training/a/loss" in [one["key"] for one in found["series"]]
        old = server.wait_for("/api/overview", lambda one: one["runs"][1]["rows"])["runs"][1]
        assert old["rows"] >= ROWS
        assert old["started_s"] is not None


def test_a_port_that_is_taken_is_named(service: LocalService, live: Server) -> None:
    """The command says what it cannot listen on, and leaves nothing behind."""
    arguments = ["ui", str(service.directory), "--port", str(live.port), "--no-open"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "cannot be listened on" in result.output
    assert "--port" in result.output


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    """The command says what is wrong, and ends with the code of a directory."""
    result = CliRunner().invoke(main, ["ui", str(tmp_path)])
    assert result.exit_code == 6
    assert "service.json" in result.output


def test_a_directory_that_cannot_be_read_is_not_taken_for_a_port(tmp_path: Path) -> None:
    """What is wrong with the directory is said, and nothing of an address."""
    result = CliRunner().invoke(main, ["ui", str(tmp_path / ("x" * 300))])
    assert result.exit_code == 6
    assert "cannot be read" in result.output
    assert "listened on" not in result.output


def test_the_address_says_how_to_get_there() -> None:
    """On the head it is opened; elsewhere the port is forwarded; with a token it is shown."""
    page = PageAddress(mode="loopback", hostname="head", loopback_port=81, address="10.0.0.1:80")
    assert addresses(page, "head")[1] == "http://localhost:81/"
    lines, url = addresses(page, "laptop")
    assert url is None
    assert "ssh -N -L 81:127.0.0.1:81 head" in lines[0]
    page = PageAddress(
        mode="network", hostname="head", loopback_port=80, address="10.0.0.1:80", token="secret"
    )
    assert addresses(page, "laptop")[1] == "http://10.0.0.1:80/?token=secret"


def test_the_historys_process_ends_with_its_parent(service: LocalService, live: Server) -> None:
    """Nothing is left of it when the pipe that it is asked through is closed."""
    live.get("/api/series?run=1")
    assert service.service is not None
    assert service.service._parts is not None
    pid = service.service._parts.page_source.pid
    assert pid is not None
    child = psutil.Process(pid)
    assert child.nice() > psutil.Process().nice()
    source = service.service._parts.page_source
    process = source._process._child
    assert process is not None
    assert process.stdin is not None
    service.service._loop._loop.call_soon_threadsafe(process.stdin.close)
    deadline = time.monotonic() + 10
    while source.pid == pid:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert live.wait_for("/api/series?run=1", lambda answer: answer["series"])
