"""The page's events: told at once and to all, never for ages alone, and not to who takes none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import psutil
import pytest
from aiohttp import web
from local_service import local_service
from page_server import Server

from raywb.errors import ServiceUnavailable
from raywb.view.page.application import Page, page_application


class Failing:
    """A source that has no overview, and counts who asks for it."""

    def __init__(self) -> None:
        self.asked = 0

    async def overview(self) -> dict[str, Any]:
        self.asked += 1
        raise ServiceUnavailable("nothing can be read")


@contextlib.contextmanager
def page_of(source: Any) -> Iterator[Server]:
    """A page of this source, in a thread of its own."""
    ports: Queue[int] = Queue()
    ended = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(page_application(Page(source)), access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.put(runner.addresses[0][1])
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield Server(ports.get(timeout=10))
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()


class Growing:
    """A source whose overview is large, and new each time."""

    def __init__(self) -> None:
        self.asked = 0

    async def overview(self) -> dict[str, Any]:
        self.asked += 1
        return {"asked": self.asked, "large": "x" * 1_500_000}


class Aging:
    """A source of which nothing changes but ages, and a value when it is set."""

    def __init__(self) -> None:
        self.asked = 0
        self.value = 0

    async def overview(self) -> dict[str, Any]:
        self.asked += 1
        source = {"heard_ago_s": self.asked + 0.5, "killed": False}
        stage = {"silent_s": 1e-05 * self.asked, "last_row_s": 2 * self.asked}
        return {"value": self.value, "sources": [source], "stages": [stage]}


def test_ages_alone_are_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows by itself is told every now and then, what is new at once."""
    monkeypatch.setattr("raywb.view.page.events.OVERVIEW_S", 0.05)
    monkeypatch.setattr("raywb.view.page.events.KEEP_ALIVE_S", 0.5)
    source = Aging()
    with page_of(source) as server, server.events() as events:
        assert next(events)["value"] == 0
        asked = source.asked
        assert next(events)["sources"][0]["heard_ago_s"] >= asked + 4.5
        source.value = 1
        assert next(events)["value"] == 1


def test_a_page_is_told_of_the_first_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many it gets some, those that are open first, and how many there are in each state."""
    monkeypatch.setattr("raywb.service.page_source.MAX_SOURCES", 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as local:
        local.up()
        local.start(mode="disabled")
        clients = [local.client("training/a", rank=rank, world_size=5) for rank in range(5)]
        for client in clients:
            client.log({"loss": 1.0}, step=0)
            assert client.flush(10.0)
        assert local.service is not None
        server = Server(local.service.page_address().loopback_port or 0)
        found = server.wait_for("/api/overview", lambda one: one["sources"] == {"live": 5})
        assert len(found["status"]["sources"]) == 3


def listen(port: int) -> socket.socket:
    """A connection on which events were asked for, of which nothing is read."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return connection


def test_who_takes_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners are bounded; the connection of one that reads nothing is closed after a time."""
    for name, value in (("KEEP_ALIVE_S", 0.4), ("OVERVIEW_S", 0.1), ("MAX_LISTENERS", 3)):
        monkeypatch.setattr(f"raywb.view.page.events.{name}", value)
    with page_of(Growing()) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(listen(server.port)) for _ in range(3)]
        for connection in silent:
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert "3 pages listen" in server.get("/api/events", 503)["error"]
        deadline = time.monotonic() + 10
        while server_sockets(server.port):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with server.events() as events:
            assert next(events)["large"]


def server_sockets(port: int) -> int:
    """Connections that a server in this process holds on its port."""
    connections = psutil.Process().net_connections("tcp")
    ours = [one for one in connections if one.laddr and one.laddr.port == port]
    return [one.status for one in ours].count(psutil.CONN_ESTABLISHED)


def test_listeners_are_told_of_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them hear why there is no overview, for which the source is asked once a second."""
    source = Failing()
    with page_of(source) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            events = stack.enter_context(server.events())
            assert next(events) == {"error": "nothing can be read"}
        assert source.asked <= 2
        assert server.get("/api/overview", 503)["error"] == "nothing can be read"
