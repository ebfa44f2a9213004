"""The client without Ray: what log() promises, measured against a service that is not there."""

from __future__ import annotations

import enum
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from local_service import CLUSTER, LocalService, local_service
from wandb_file import read_runs

from raywb.client import Client
from raywb.connection import Connection
from raywb.errors import MetricTypeError, SettingsError
from raywb.journal import Segments
from raywb.reports import RunInfo
from raywb.rows import Channel, Frame, Hello, Row, decode, scan
from raywb.shipping import Endpoint

#: The lane for the newest cosmos-xenna has no torch; the first one always does.
torch = pytest.importorskip("torch")


class Answer(enum.Enum):
    NO = False


RUN = RunInfo(project="p", id="i", name="n", mode="offline", dir="/d")


@pytest.fixture
def journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    return tmp_path / "journals"


@pytest.fixture
def alone(journals: Path) -> Iterator[Client]:
    """A client whose service does not answer."""
    endpoint = Endpoint(address="127.0.0.1:9", token="t", cluster_id=CLUSTER.cluster_id)
    connection = Connection(CLUSTER, endpoint, 1)
    yield Client(connection, connection.open_channel("s", None, None), "s", RUN)
    if connection.shipper is not None:
        connection.shipper.stop()


@pytest.fixture
def service(tmp_path: Path, journals: Path) -> Iterator[LocalService]:
    with local_service(tmp_path) as local:
        yield local


def messages_of(segments: Segments) -> list:
    _, data = segments.read(0, 10**8)
    return [decode(piece.payload) for piece in scan(data) if isinstance(piece, Frame)]


def test_a_journal_tells_who_writes(alone: Client) -> None:
    """The first frames name the process and the stage, then come the rows."""
    alone.log({"x": 1.5}, step=3)
    hello, channel, row = messages_of(alone._connection.journal.segments)
    assert isinstance(hello, Hello)
    assert (hello.cluster_id, hello.pid) == (CLUSTER.cluster_id, os.getpid())
    assert channel == Channel(0, "s", None, None)
    assert isinstance(row, Row)
    assert (row.step, row.metrics) == (3, {"x": 1.5})


def test_without_a_service_rows_wait_on_disk(alone: Client) -> None:
    """A service that does not answer changes nothing for log(); flush says so in its time."""
    for number in range(1000):
        alone.log({"x": number})
    assert not alone.flush(0.3)
    stats = alone.stats
    assert stats.logged == 1000
    assert stats.backlog_bytes > 0
    assert (stats.acked_bytes, stats.lost) == (0, {})
    assert len(messages_of(alone._connection.journal.segments)) == 1002


def test_a_strict_client_raises(alone: Client) -> None:
    """With strict=True a value that cannot be charted is a TypeError that names key and type."""
    strict = Client(alone._connection, 0, "s", RUN, strict=True)
    with pytest.raises(MetricTypeError, match=r"'bad' is list: log\(\) takes") as caught:
        strict.log({"good": 1, "bad": []})
    assert isinstance(caught.value, TypeError)


def test_odd_calls_do_not_raise(alone: Client, caplog: pytest.LogCaptureFixture) -> None:
    """Odd steps, empty rows, huge rows and integers are handled, counted or left out."""
    with caplog.at_level(logging.WARNING, "raywb"):
        alone.log({})
        alone.log({"x": 1}, step="seven")
        alone.log({"x": 2**200}, step=2**70)
        alone.log({"huge": "x" * 5_000_000})
        alone.log({"x": "\ud800"})
        alone.log({1: 2})
        alone.log(None)
        alone.log([("x", 1)])
        alone.log({"x": 5}, step=True)
        alone.log({"x": torch.empty((), device="meta")})
    rows = [m for m in messages_of(alone._connection.journal.segments) if isinstance(m, Row)]
    assert [(row.step, row.metrics) for row in rows] == [
        (None, {"x": 1}),
        (float(2**70), {"x": float(2**200)}),
        (None, {"x": "?"}),
        (None, {"1": 2}),
        (1, {"x": 5}),
    ]
    assert alone.stats.rejected == 5
    texts = [record.getMessage() for record in caplog.records]
    assert any("a step is a number" in text for text in texts)
    assert any("bytes" in text and "'huge'" in text for text in texts)


def test_a_known_shape_changes_nothing(alone: Client) -> None:
    """Rows like one that was logged before are looked at as closely as the first one."""
    good = {"loss": 1.5, "epoch": 3, "done": False}
    alone.log(good, step=1)
    alone.log({**good, "loss": -0.0, "epoch": 4}, step=2)
    # Each is encoded to as many bytes as its like in the first row.
    alone.log({**good, "loss": [1, 2, 3, 4, 5, 6, 7, 8]}, step=3)
    alone.log({**good, "epoch": None}, step=4)
    alone.log({**good, "done": Answer.NO}, step=5)
    alone.log({**good, "loss": numpy.float64(2.5)}, step=6)
    alone.log(good, step=True)
    alone.log({**good, "loss": 2}, step=[])
    rows = [m for m in messages_of(alone._connection.journal.segments) if isinstance(m, Row)]
    assert [(row.step, row.metrics) for row in rows] == [
        (1, good),
        (2, {"loss": 0.0, "epoch": 4, "done": False}),
        (3, {"epoch": 3, "done": False}),
        (4, {"loss": 1.5, "done": False}),
        (5, {"loss": 1.5, "epoch": 3, "done": False}),
        (6, {"loss": 2.5, "epoch": 3, "done": False}),
        (1, good),
        (None, {"loss": 2, "epoch": 3, "done": False}),
    ]
    assert (alone.stats.rejected, alone.stats.logged, alone.stats.logged) == (3, 8, 8)


def test_after_close_rows_are_counted(alone: Client, caplog: pytest.LogCaptureFixture) -> None:
    """log() after close() is a counted loss with one warning; other clients go on."""
    other = Client(alone._connection, alone._connection.open_channel("o", None, None), "o", RUN)
    alone.close(timeout_s=0.01)
    alone.close(timeout_s=0.01)
    with caplog.at_level(logging.WARNING, "raywb"):
        alone.log({"x": 1})
        alone.log({"x": 2})
    assert alone.stats.lost == {"after_close": 2}
    assert len(caplog.records) == 1
    other.log({"x": 3})
    assert messages_of(other._connection.journal.segments)[-1].metrics == {"x": 3}


def test_a_bad_definition_is_named(alone: Client) -> None:
    """define_metric refuses what W&B's client would refuse, in the caller's own frame."""
    with pytest.raises(SettingsError, match=r"summary='min, median'.* median is not among"):
        alone.define_metric("x", summary="min, median")
    with pytest.raises(SettingsError, match=r"name='a/\*/b'"):
        alone.define_metric("a/*/b")


def test_a_config_too_large_is_refused(alone: Client, caplog: pytest.LogCaptureFixture) -> None:
    """A config beyond the limit of one message is refused and counted, and harms no row."""
    with caplog.at_level(logging.WARNING, "raywb"):
        alone.config.update({"huge": "x" * 5_000_000})
    assert "ConfigUpdate" in caplog.text
    assert alone.stats.rejected == 1
    alone.log({"x": 1})
    assert messages_of(alone._connection.journal.segments)[-1].metrics == {"x": 1}


def test_no_journal_is_counted_until_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no journal can be made log() counts the rows, and goes on when one can."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(blocked))
    connection = Connection(CLUSTER, None, 1)
    client = Client(connection, connection.open_channel("s", None, None), "s", RUN)
    client.log({"x": 1})
    lost = client.stats.lost["no_journal"]
    assert lost >= 1
    assert not client.flush(0.01)
    blocked.unlink()
    deadline = time.monotonic() + 10
    while connection.journal is None:  # it is tried again once a second
        assert time.monotonic() < deadline
        client.log({"x": 2})
    lost = client.stats.lost["no_journal"]
    client.log({"x": 2})
    assert [type(m).__name__ for m in messages_of(connection.journal.segments)][:2] == [
        "Hello",
        "Channel",
    ]
    assert messages_of(connection.journal.segments)[-1].metrics == {"x": 2}
    assert client.stats.lost["no_journal"] == lost
    assert connection.shipper is not None
    connection.shipper.stop()


def test_threads_lose_nothing(service: LocalService) -> None:
    """Rows of many threads all arrive, each thread's in its order."""
    service.up()
    service.start()
    client = service.client("s")

    def work(name: int) -> None:
        for number in range(500):
            client.log({"thread": name, "x": number})

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.stats.logged == 4000
    assert client.flush(30.0)
    assert service.service.finish(60.0, 0).received_rows == 4000
    (run,) = read_runs(service.directory).values()
    for name in range(8):
        mine = [row["s/x"] for row in run.history if row["s/thread"] == name]
        assert mine == list(range(500))


def test_a_signal_handler_may_log(alone: Client) -> None:
    """A handler that logs in the middle of a log() neither deadlocks nor tears a frame."""
    import signal

    def handler(*_: object) -> None:
        alone.log({"handler": 1})

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for number in range(20_000):
            alone.log({"x": number})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    rows = [
        m.metrics for m in messages_of(alone._connection.journal.segments) if isinstance(m, Row)
    ]
    assert [row["x"] for row in rows if "x" in row] == list(range(20_000))
    assert any("handler" in row for row in rows)
    assert alone._connection.journal.end == alone._connection.journal.segments.end()


def test_a_forked_child_is_a_source_of_its_own(service: LocalService) -> None:
    """A child forked after attach logs under its own source, and both sets of rows arrive."""
    service.up()
    service.start()
    client = service.client("s")
    client.log({"who": "parent", "x": 0})
    pid = os.fork()
    if pid == 0:
        client._connection.after_fork_in_child()
        client.log({"who": "child", "x": 0})
        os._exit(0 if client.flush(20.0) else 1)
    client.log({"who": "parent", "x": 1})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert client.flush(20.0)
    assert service.service.finish(60.0, 0).received_rows == 3
    (run,) = read_runs(service.directory).values()
    assert [row["s/x"] for row in run.history if row["s/who"] == "parent"] == [0, 1]
    assert [row["s/x"] for row in run.history if row["s/who"] == "child"] == [0]
    assert len(service.status().sources) == 2


def test_the_token_is_not_in_a_repr(service: LocalService) -> None:
    """An endpoint can be printed without showing what it is to show."""
    service.up()
    endpoint = service.endpoint
    assert endpoint.token not in repr(endpoint)
    assert endpoint.address in repr(endpoint)


def test_many_attaches_are_one_channel(alone: Client) -> None:
    """Whoever attaches again for the same stage and rank gets the same channel."""
    connection = alone._connection
    numbers = {connection.open_channel("s", None, None) for _ in range(10_000)}
    assert numbers == {connection.open_channel("s", None, None)}
    others = [("s", 0, 2), ("s", 1, 2), ("t", None, None)]
    assert len({connection.open_channel(*other) for other in others} | numbers) == 4
    series = {connection.open_channel("s", None, None, label="a", axis="t") for _ in range(3)}
    assert len(series) == 3
    assert len(messages_of(connection.journal.segments)) < 10
