"""Tensors on a device are logged without waiting for it, and arrive in order."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import device_stand_in
import pytest
from device_stand_in import DEVICE, Tensor
from local_service import CLUSTER, LocalService
from wandb_file import read_runs

from raywb import rows_aside
from raywb.client import Client
from raywb.connection import Connection
from raywb.device_values import forget_devices, is_on_device
from raywb.reports import RunInfo
from raywb.rows import Frame, Row, decode, scan


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """A device with an empty queue."""
    DEVICE.__init__()  # type: ignore[misc]
    yield
    DEVICE.__init__()  # type: ignore[misc]
    forget_devices()


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client whose rows stay in its journal."""
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path))
    connection = Connection(CLUSTER, None, 1)
    run = RunInfo(project="p", id="i", name="n", mode="offline", dir=str(tmp_path))
    yield Client(connection, connection.open_channel("train", None, None), "train", run)
    connection.close(0.1)


def logged(client: Client) -> list[tuple[object, dict]]:
    """Step and values of the rows in the client's journal."""
    journal = client._connection.journal
    assert journal is not None
    _, data = journal.segments.read(0, 1 << 24)
    found = [decode(one.payload) for one in scan(data) if isinstance(one, Frame)]
    return [(row.step, row.metrics) for row in found if isinstance(row, Row)]


def test_log_does_not_wait_and_order_is_kept(client: Client) -> None:
    """Rows behind one that waits come after it, and each has the value of its own moment."""
    client.log({"loss": Tensor(1.5), "lr": 0.1}, step=1)
    client.log({"loss": 2.0}, step=2)
    client.log({"nested": {"loss": Tensor(3.5)}}, step=3)
    assert logged(client) == []
    assert (client.stats.logged, client.stats.waiting_on_device) == (0, 3)
    DEVICE.compute(2)  # the first tensor, and the event behind it
    client.log({"loss": 4.0}, step=4)
    assert logged(client) == [(1, {"loss": 1.5, "lr": 0.1}), (2, {"loss": 2.0})]
    DEVICE.compute()
    client.log({"loss": 5.0}, step=5)
    assert [step for step, _ in logged(client)] == [1, 2, 3, 4, 5]
    assert logged(client)[2][1] == {"nested/loss": 3.5}
    assert (client.stats.logged, client.stats.waiting_on_device) == (5, 0)
    client.log({"loss": 6.0}, step=6)
    assert not client._careful  # plain rows go the short way again
    assert len(logged(client)) == 6


def test_the_row_keeps_its_time(client: Client) -> None:
    """A row that waited has the time of its log(), not that of its device."""
    client.log({"x": Tensor(1.0)})
    client.log({"x": 2.0, "after": True})
    DEVICE.compute()
    client.log({"x": 3.0})
    journal = client._connection.journal
    assert journal is not None
    _, data = journal.segments.read(0, 1 << 24)
    found = [decode(one.payload) for one in scan(data) if isinstance(one, Frame)]
    times = [row.time_s for row in found if isinstance(row, Row)]
    assert times == sorted(times)
    assert len(set(times)) == 3


@pytest.mark.parametrize("end", ["flush", "close", "exit"])
def test_flush_close_and_the_end_wait(client: Client, end: str) -> None:
    """They wait until the device has come to the row."""
    client.log({"loss": Tensor(1.5)}, step=1)
    late = threading.Timer(0.2, DEVICE.compute)
    late.start()
    if end == "flush":
        client.flush(0.5)
    elif end == "close":
        client.close(0.5)
    else:
        client._connection.at_exit()
    late.join()
    assert logged(client) == [(1, {"loss": 1.5})]


def test_flush_is_bounded_and_says_so(client: Client) -> None:
    """A device that hangs holds nobody beyond the time-out; the row goes on waiting."""
    client.log({"loss": Tensor(1.5)}, step=1)
    assert client.flush(0.1) is False
    assert client.stats.waiting_on_device == 1
    DEVICE.compute()
    client.flush(0.1)
    assert logged(client) == [(1, {"loss": 1.5})]


def test_close_gives_up_a_value_and_not_its_row(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """What the device does not come to is left out and counted; the rest of the rows is logged."""
    client.log({"loss": Tensor(1.5), "lr": 0.1}, step=1)
    client.log({"loss": Tensor(1.5)}, step=2)
    client.log({"loss": 3.0}, step=3)
    client.close(0.1)
    assert logged(client) == [(1, {"lr": 0.1}), (3, {"loss": 3.0})]
    assert (client.stats.rejected, client.stats.lost) == (2, {"no_device_value": 1})
    assert "did not come to it in time" in caplog.text


def test_a_device_that_fails_costs_its_values(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the device raises in nobody's log(); the row goes on without the value."""
    client.log({"loss": Tensor(1.5), "lr": 0.1}, step=1)
    DEVICE.broken = True
    client.log({"loss": 2.0}, step=2)
    assert logged(client) == [(1, {"lr": 0.1}), (2, {"loss": 2.0})]
    assert client.stats.rejected == 1
    assert "device-side assert" in caplog.text


def test_too_many_rows_wait_for_the_first(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: beyond a number of rows log() waits, for the oldest alone."""
    monkeypatch.setattr(rows_aside, "MOST_ROWS", 4)
    for step in range(4):
        client.log({"loss": Tensor(step)}, step=step)
    late = threading.Timer(0.2, DEVICE.compute, (2,))
    late.start()
    client.log({"loss": Tensor(4)}, step=4)
    late.join()
    assert [step for step, _ in logged(client)] == [0]
    assert client.stats.waiting_on_device == 4


def test_a_device_that_hangs_holds_log_for_a_while_only(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for once, given up by all clients, and used again when it answers."""
    monkeypatch.setattr(rows_aside, "MOST_ROWS", 1)
    monkeypatch.setattr(rows_aside, "LONGEST_WAIT_S", 0.2)
    other = second(client)
    other.log({"loss": Tensor(0.0), "lr": 0.0}, step=0)
    client.log({"loss": Tensor(1.0), "lr": 0.1}, step=1)
    client.log({"loss": Tensor(2.0), "lr": 0.2}, step=2)
    assert sorted(step for step, _ in logged(client)) == [0, 1, 2]
    assert all(set(row) == {"lr"} for _, row in logged(client))
    assert (client.stats.rejected, client.stats.waiting_on_device) == (3, 0)
    queued = DEVICE.queued
    began = time.monotonic()
    for step in range(3, 13):
        (client if step % 2 else other).log({"loss": Tensor(step), "lr": 0.3}, step=step)
    assert time.monotonic() - began < 0.2
    assert DEVICE.queued == queued + 10  # the tensors, and no event
    assert logged(client)[3:] == [(step, {"lr": 0.3}) for step in range(3, 13)]
    DEVICE.compute()
    other.log({"loss": Tensor(13.0)}, step=13)
    DEVICE.compute()
    other.log({"loss": 14.0}, step=14)
    assert logged(client)[13:] == [(13, {"loss": 13.0}), (14, {"loss": 14.0})]


def second(client: Client) -> Client:
    """Another client of the same process."""
    connection = client._connection
    return Client(connection, connection.open_channel("other", None, None), "other", client.run)


@pytest.mark.parametrize("waits", ["flush", "full"])
def test_who_waits_holds_up_no_other_thread(
    client: Client, monkeypatch: pytest.MonkeyPatch, waits: str
) -> None:
    """While one thread waits for a device, log() of others returns, and loses no order."""
    monkeypatch.setattr(rows_aside, "MOST_ROWS", 1 if waits == "full" else 64)
    client.log({"loss": Tensor(1.0)}, step=1)
    if waits == "flush":
        waiting = threading.Thread(target=client._connection._settle, args=(5.0,))
    else:
        waiting = threading.Thread(target=client.log, args=({"loss": 2.0},), kwargs={"step": 2})
    waiting.start()
    while waits == "full" and client.stats.waiting_on_device < 2:
        time.sleep(0.001)
    began = time.monotonic()
    second(client).log({"x": 1.0}, step=9)
    if waits == "flush":
        client.log({"loss": 3.0}, step=3)
    assert time.monotonic() - began < 0.3
    assert waiting.is_alive()
    assert logged(client) == [(9, {"x": 1.0})]
    DEVICE.compute()
    client.log({"loss": 4.0}, step=4)
    waiting.join(5.0)
    assert not waiting.is_alive()
    steps = [step for step, _ in logged(client)]
    assert steps == [9, 1, 3 if waits == "flush" else 2, 4]
    assert client.stats.waiting_on_device == 0


def test_a_row_between_two_threads_overtakes_none(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain row, logged while another thread makes its copies, leaves later rows behind those."""
    copies = rows_aside.Copies
    entered, go = threading.Event(), threading.Event()

    def slow(values: dict) -> object:
        entered.set()
        assert go.wait(5.0)
        return copies(values)

    monkeypatch.setattr(rows_aside, "Copies", slow)
    thread = threading.Thread(target=client.log, args=({"loss": Tensor(1.0)},), kwargs={"step": 1})
    thread.start()
    assert entered.wait(5.0)
    client.log({"nested": {"x": 1.0}}, step=0)  # with a second look
    go.set()
    thread.join()
    client.log({"loss": 2.0}, step=2)
    assert [step for step, _ in logged(client)] == [0]
    DEVICE.compute()
    client.log({"loss": 3.0}, step=3)
    assert [step for step, _ in logged(client)] == [0, 1, 2, 3]


def test_only_the_thread_that_copied_asks(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush() elsewhere asks no device, since that would end a capture that it cannot see."""
    asked: list[threading.Thread] = []
    query = device_stand_in.Event.query

    def noted(event: device_stand_in.Event) -> bool:
        asked.append(threading.current_thread())
        return query(event)

    monkeypatch.setattr(device_stand_in.Event, "query", noted)
    client.log({"loss": Tensor(1.0)}, step=1)
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(client._connection._settle(0.1)))
    thread.start()
    thread.join()
    assert ended == [False]
    assert set(asked) == {threading.current_thread()}
    DEVICE.compute()
    closing = threading.Thread(target=client.close, args=(0.1,))
    closing.start()
    closing.join()
    assert logged(client) == [(1, {"loss": 1.0})]


def test_rows_of_a_thread_that_ended_are_had(client: Client) -> None:
    """Nobody else could ask for them, and it captures nothing any more."""
    thread = threading.Thread(target=client.log, args=({"loss": Tensor(1.0)},))
    thread.start()
    thread.join()
    DEVICE.compute()
    client.flush(0.1)
    assert logged(client) == [(None, {"loss": 1.0})]


def test_a_capture_is_not_disturbed(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """While a graph is captured nobody asks the device; its tensors are refused by name."""
    client.log({"loss": Tensor(1.0)}, step=1)
    DEVICE.capturing = True
    client.log({"loss": Tensor(2.0), "lr": 0.1}, step=2)
    DEVICE.capturing = False
    DEVICE.compute()
    client.log({"loss": 3.0}, step=3)
    assert logged(client) == [(1, {"loss": 1.0}), (2, {"lr": 0.1}), (3, {"loss": 3.0})]
    assert "captured" in caplog.text


def test_a_forked_child_leaves_the_rows_to_its_parent(client: Client) -> None:
    """The child asks no device, and the parent's rows are logged once."""
    client.log({"loss": Tensor(1.0)}, step=1)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client._connection.after_fork_in_child()
            DEVICE.broken = True
            client.log({"child": 1.0}, step=9)
            DEVICE.__init__()  # type: ignore[misc]
            client.log({"child": Tensor(2.0)}, step=10)
            DEVICE.compute()
            client.flush(0.1)  # finds the child's rows
            os.write(write, repr(logged(client)).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1000) == b"[(9, {'child': 1.0}), (10, {'child': 2.0})]"
    DEVICE.compute()
    client.flush(0.1)
    assert logged(client) == [(1, {"loss": 1.0})]


def test_tensors_on_the_host_do_not_wait(client: Client) -> None:
    """Tensors of the real torch on the CPU, and parameters, are taken at once as before."""
    torch = pytest.importorskip("torch")
    client.log({"a": torch.tensor(1.5), "b": torch.nn.Parameter(torch.ones(1))}, step=1)
    assert logged(client) == [(1, {"a": 1.5, "b": 1.0})]
    assert not is_on_device(torch.empty((), device="meta"))
    assert is_on_device(Tensor(1.0))
    assert device_stand_in.standin.Event is not None


def test_they_arrive_in_the_run(service: LocalService) -> None:
    """Through the service into W&B's file, between plain rows, each in its place."""
    service.up()
    service.start()
    client = service.client("train")
    for step in range(10):
        client.log({"loss": Tensor(step / 2) if step % 3 == 0 else step / 2}, step=step)
        if step % 4 == 0:
            DEVICE.compute()
    DEVICE.compute()
    client.close()
    assert service.service is not None
    assert service.service.finish(60.0, 0).complete
    run = read_runs(service.directory)["run00001"]
    assert run.values("train/loss") == [step / 2 for step in range(10)]
    assert run.values("train/step") == list(range(10))
