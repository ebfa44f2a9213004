"""Requests from strangers, and frames from a hostile client that has the token.

The service runs in a process of its own, so that its memory can be seen. Whatever is sent to it,
it refuses by one of a few reasons, writes nothing outside its directory, stays within bounds,
and goes on serving the others.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_service import CLUSTER
from ray_cluster import until

from raywb.client import Client
from raywb.connection import Connection
from raywb.reports import RunInfo, Status
from raywb.rows import (
    HEADER,
    MARK,
    PROTOCOL,
    Channel,
    ConfigUpdate,
    Counters,
    Define,
    Hello,
    Row,
    SummaryUpdate,
    encode,
    frame,
)
from raywb.service.delivery import Delivery
from raywb.service.outbox import OutRow
from raywb.service.sink_messages import pack
from raywb.service.sink_process import _apply_request, definitions
from raywb.shipping import Endpoint

LONG = bool(os.environ.get("RAYWB_LONG"))

#: A service that answers questions about itself on its pipes.
SERVICE = """
import sys
from pathlib import Path
import msgspec
from local_service import local_service
from raywb.service import ingest

ingest.BODY_STALL_S = 2.0
ingest.STRANGER_S = 3.0
with local_service(Path(sys.argv[1])) as local:
    local.up()
    local.start(mode="disabled")
    endpoint = local.endpoint
    print(msgspec.json.encode([endpoint.address, endpoint.token]).decode(), flush=True)
    for line in sys.stdin:
        print(msgspec.json.encode(local.status()).decode(), flush=True)
"""


class ServiceProcess:
    """A service in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdout is not None
        self.address, self.token = json.loads(self._process.stdout.readline())
        self.host, _, port = self.address.rpartition(":")
        self.port = int(port)

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def lets_in(self, connections: list[socket.socket]) -> int:
        """How many of these connections it holds at present."""
        held = psutil.Process(self._process.pid).net_connections("tcp")
        ports = {connection.raddr.port for connection in held if connection.raddr}
        return sum(connection.getsockname()[1] in ports for connection in connections)

    def status(self) -> Status:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=Status)

    def client(self) -> Client:
        """A client in good order, which goes on as if nothing was."""
        endpoint = Endpoint(address=self.address, token=self.token, cluster_id=CLUSTER.cluster_id)
        connection = Connection(CLUSTER, endpoint, 1)
        run = RunInfo(project="p", id="i", name="n", mode="disabled", dir="/d")
        return Client(connection, connection.open_channel("s", None, None), "s", run)

    def headers(self, **others: str) -> dict[str, str]:
        known = {
            "Authorization": f"Bearer {self.token}",
            "X-Raywb-Cluster": CLUSTER.cluster_id,
            "X-Raywb-Protocol": str(PROTOCOL),
        }
        return {key: value for key, value in (known | others).items() if value}

    def post(
        self, body: bytes = b"", *, source: str = "a" * 32, offset: str = "0", **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """One request on a connection of its own; returns status and answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        path = f"/v1/frames?source={source}&offset={offset}"
        try:
            connection.request("POST", path, body, self.headers(**headers))
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()

    def opening(self, length: int, path: str = f"/v1/frames?source={'a' * 32}&offset=0") -> bytes:
        """The head of a request that promises a body."""
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length}"]
        lines += [f"{key}: {value}" for key, value in self.headers().items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout=30)
        connection.sendall(data)
        return connection

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    process = ServiceProcess(tmp_path_factory.mktemp("strangers"))
    try:
        yield process
    finally:
        process.close()


@pytest.fixture
def neighbour(
    service: ServiceProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    """A client in good order, whose rows must all arrive whatever the others do."""
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    client = service.client()
    before = service.status().received_rows
    for number in range(10):
        client.log({"x": number})
    yield client
    for number in range(10, 20):
        client.log({"x": number})
    assert client.flush(30.0)
    until("the neighbour's rows", lambda: service.status().received_rows >= before + 20, 20.0)
    client._connection.close(5.0)


def files_of(service: ServiceProcess) -> set[str]:
    """Names of all files, without what grows in them."""
    return {str(path) for path in service.directory.rglob("*")}


STRANGE = {
    "no token": {"Authorization": ""},
    "a wrong token": {"Authorization": "Bearer " + "x" * 43},
    "half a token": {"Authorization": "Bearer "},
    "a token of odd bytes": {"Authorization": "Bearer \xff\xfe\u00e9"},
    "another cluster": {"X-Raywb-Cluster": "d" * 56},
    "no cluster": {"X-Raywb-Cluster": ""},
    "another protocol": {"X-Raywb-Protocol": "2"},
}


@pytest.mark.parametrize("what", STRANGE)
def test_strangers_are_refused_unread(
    service: ServiceProcess, neighbour: Client, what: str
) -> None:
    """Without token, cluster or protocol even a huge body is refused, and nothing is kept of it."""
    before = files_of(service), service.rss_bytes
    status, answer = service.post(frame(encode(Row(0, 1.0, None, {"x": 1}))), **STRANGE[what])
    assert status in (401, 403, 426)
    assert service.token not in str(answer)
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
        assert service.post(b"x" * 50_000_000, **STRANGE[what])[0] in (401, 403, 426)
    assert files_of(service) == before[0]
    assert service.rss_bytes - before[1] < 40_000_000


PATHS = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "a" * 31, "A" * 32, "a" * 33,
         "%00" * 32, "\u0661" * 32, "", "a" * 4000]  # fmt: skip
OFFSETS = ["-1", "1e3", "\u0661", "\u00b2", "9" * 19, "9" * 30, "9" * 5000, "0x10", " 1", ""]


def test_tricks_in_ids_and_offsets_are_refused(service: ServiceProcess, neighbour: Client) -> None:
    """Whatever stands for a source or an offset: refused, by one reason, with nothing written."""
    before = files_of(service)
    reasons = set(service.status().problems)
    for source in PATHS:
        path = source.encode("utf-8").decode("latin-1") if source.isascii() else quoted(source)
        assert service.post(b"x", source=path)[0] == 400
    for offset in OFFSETS:
        text = offset.replace(" ", "%20") if offset.isascii() else quoted(offset)
        assert service.post(b"x", offset=text)[0] == 400
    assert files_of(service) == before
    more = [problem for problem in service.status().problems if problem not in reasons]
    assert len(more) == 1, more


def quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def test_the_reasons_of_refusals_are_few(service: ServiceProcess, neighbour: Client) -> None:
    """Whatever a stranger makes up, the status does not grow by it."""
    for _ in range(3):
        for headers in STRANGE.values():
            made_up = {key: value + secrets.token_hex(8) for key, value in headers.items() if value}
            service.post(**(headers | made_up))
        service.post(source=secrets.token_hex(30))
        service.post(offset=secrets.token_hex(8) + "x")
    problems = service.status().problems
    assert len(problems) < 10
    assert max(map(len, problems)) < 200


def test_slow_and_silent_connections_are_sent_away(
    service: ServiceProcess, neighbour: Client
) -> None:
    """Connections that say nothing, or no more than half a head, do not stay and do not add up.

    Those who have shown the token and then stop in the middle of a body keep nobody waiting.
    """
    before = service.rss_bytes
    stopped = [service.connect(service.opening(1_000_000) + b"x" * 1000) for _ in range(40)]
    until("them to be let in", lambda: service.lets_in(stopped) == 40, 10.0)
    began = time.monotonic()
    neighbour.log({"between": 1})
    assert neighbour.flush(14.0)
    print(f"flushed behind stopped ones after {time.monotonic() - began:.1f} s")
    half = service.opening(100)[:-30]
    silent = [service.connect(data) for data in [b"", half] * 400]
    neighbour.log({"between": 1})
    assert neighbour.flush(5.0)
    until("all of them to be gone", lambda: service.lets_in([*silent, *stopped]) == 0, 40.0)
    for connection in silent:
        connection.settimeout(1.0)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(100) == b""
    for connection in [*silent, *stopped]:
        connection.close()
    problems = " ".join(service.status().problems)
    # Through loopback they may be connections that a browser opened in advance.
    assert "no token in time" not in problems
    assert "a body that did not come in time" in problems
    assert service.rss_bytes - before < 60_000_000


def test_huge_bodies_are_bounded(service: ServiceProcess, neighbour: Client) -> None:
    """Many large bodies at once, compressed ones among them, take no more than their bound."""
    import gzip

    status, _ = service.post(gzip.compress(bytes(50_000_000)), **{"Content-Encoding": "gzip"})
    assert status == 200  # bytes like others, and damage in what they are
    before = service.rss_bytes
    peak = [before]
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.01):
            peak.append(service.rss_bytes)

    def offer(number: int) -> None:
        body = bytes(7_900_000)
        source = f"{number:032x}"
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            service.post(b"x" * 9_000_000, source=source)
        service.post(body, source=source)

    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=offer, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    watching.set()
    watcher.join()
    grown = (max(peak) - before) / 1e6
    print(f"RSS grew by {grown:.0f} MB at most")
    assert grown < 400


LENGTHS = [HEADER.pack(MARK, length, 0) for length in (2**32 - 1, 2**31, 5_000_000, 4_000_000)]


def nested(depth: int) -> bytes:
    return b"\x93\x03\x00\x81\xa1k" + b"\x91" * depth + b"\xc0"


MADE_UP = [f"made_up_{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(600)]

#: Messages of the right shape with values that no client of ours would send.
ODD = [
    Row(0, float("inf"), None, {"x": 1}),
    Row(2**62, 1.0, 2**63, {"x": 2**64 - 1, "": "", "../x": True}),
    Channel(10**9, "s", None, None),
    Channel(1, "../" * 2000, -5, -5, "*", "*"),
    Hello("../../../etc", "c", "n", -1, -1, "h" * 100_000, 0.0, "v"),
    Counters(2**63, {"disk_full": 2**63}),
    Counters(-5, {"disk_full": -5}),
    Counters(0, dict.fromkeys(MADE_UP, 1)),
    Counters(0, {"../../x": 1, "\n": 1, "x" * 100_000: 1}),
    Define(0, "a*b*c", "*", "bogus"),
    [3, 0, {"t": msgspec.msgpack.Ext(5, b"x")}],
    [3, 0, {"t": b"bytes"}],
    [4, 0, {"t": {1: 2}}],
    [4, 0, {"t": msgspec.msgpack.Ext(-1, b"\x00" * 4)}],
]

HOSTILE = [
    *[header * 20_000 for header in LENGTHS],
    *[frame(nested(depth)) for depth in (90, 5000, 1_000_000)],
    frame(b"\xdf\xff\xff\xff\xff"),
    frame(encode(Channel(2, "../../up", 0, 1, "..", "a*b"))) + frame(encode(Row(2, 1.0, 1, {}))),
    *[frame(msgspec.msgpack.encode(message)) for message in ODD],
    bytes(1_000_000),
    b"RW" * 500_000,
]


def test_hostile_frames_harm_nobody(service: ServiceProcess, neighbour: Client) -> None:
    """Huge lengths, wrong types, deep nesting and strange names: counted, and the rest goes on."""
    before = files_of(service)
    for number, body in enumerate(HOSTILE, 1000):
        status, answer = service.post(body, source=f"{number:032x}")
        assert (status, answer["end"]) == (200, len(body))
        more = frame(encode(Row(0, 1.0, None, {"x": 1})))
        assert service.post(more, source=f"{number:032x}", offset=str(len(body)))[0] == 200
    status = until(
        "all of it to be consumed",
        lambda: (found := service.status()).received_rows >= len(HOSTILE) and found,
        30.0,
    )
    assert not [problem for problem in status.problems if "failed" in problem]
    assert status.lost["damaged_frames"] >= len(LENGTHS) + 10
    assert len(status.lost) < 100
    assert all(0 < count < 10**9 for count in status.lost.values())
    assert files_of(service) == before
    assert len(msgspec.json.encode(status)) < 100_000


integers = st.integers(-(2**63), 2**64 - 1)
few = st.integers(0, 3)
text = st.text(max_size=6)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.floats(),
    text,
    st.binary(max_size=4),
    st.builds(msgspec.msgpack.Ext, st.integers(-2, 5), st.binary(max_size=4)),
)
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(text, st.integers(0, 9)), inner, max_size=3),
    ),
    max_leaves=8,
)
names = st.one_of(st.none(), text, st.sampled_from(["a", "a/b", "a*", "*", ""]))
keys = st.one_of(text, st.just("_timestamp"))
metrics = st.dictionaries(keys, st.one_of(integers, st.floats(), st.booleans(), text), max_size=3)
steps = st.one_of(st.none(), integers, st.floats())
counts = st.integers(-9, 2**63)
#: Messages of the right shape with odd values in them, and arrays that are none at all.
odd_messages = st.one_of(
    st.builds(Row, few, st.floats(), steps, metrics),
    st.builds(Channel, few, names, st.none() | few, st.none() | few, names, names),
    st.builds(Define, few, text, names, names),
    st.builds(Counters, counts, st.dictionaries(text, counts, max_size=3)),
    st.builds(ConfigUpdate, few, metrics),
    st.builds(SummaryUpdate, few, metrics),
    st.tuples(st.integers(3, 4), few, anything),
    st.lists(anything, max_size=5),
)


@settings(max_examples=5000 if LONG else 150, deadline=None)
@given(st.lists(st.lists(odd_messages, max_size=4), min_size=1, max_size=4))
def test_any_message_passes_or_is_counted(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[list[Any]]
) -> None:
    """From ledger to what the sink is told: nothing raises, also after a restart, and rows stay."""
    directory = tmp_path_factory.mktemp("delivery")
    delivery = Delivery(directory)
    delivery.open_run(1)
    for number, messages in enumerate(bodies):
        row = Row(0, 1.0, None, {"mine": number})
        frames = [frame(msgspec.msgpack.encode(message)) for message in [*messages, row]]
        source = f"{number % 2:032x}"
        delivery.ledger.append(source, delivery.ledger.end_of(source), b"".join(frames))
    delivery.advance(None)
    states = []
    for _ in range(2):
        items = delivery.outbox.read(delivery.outbox.cursor(1, 0), 10_000)
        rows = [item for _, item in items if isinstance(item, OutRow)]
        mine = [v for row in rows for key, v in row.metrics.items() if key.endswith("mine")]
        assert mine == list(range(len(bodies)))
        pack(_apply_request(items))
        fold = delivery.folds[1]
        json.dumps([fold.config, fold.summary(), definitions(fold)])
        states.append(msgspec.json.encode([fold.config, delivery.merge.lost, len(rows)]))
        delivery.close()
        delivery = Delivery(directory)
        delivery.open_run(1)
    delivery.close()
    assert states[0] == states[1]
