"""Tensors on a device are logged without waiting for it, and arrive in order."""

from __future__ import annotations

import os
import threading
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
from raywb.device_values import is_on_device
from raywb.reports import RunInfo
from raywb.rows import Frame, Row, decode, scan


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """A device with an empty queue."""
    DEVICE.__init__()  # type: ignore[misc]
    yield
    DEVICE.__init__()  # type: ignore[misc]


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
    """With too many rows waiting, the first goes without its value in the end."""
    monkeypatch.setattr(rows_aside, "MOST_ROWS", 1)
    monkeypatch.setattr(rows_aside, "LONGEST_WAIT_S", 0.1)
    client.log({"loss": Tensor(1.0), "lr": 0.1}, step=1)
    client.log({"loss": Tensor(2.0)}, step=2)
    assert logged(client) == [(1, {"lr": 0.1})]
    assert (client.stats.rejected, client.stats.waiting_on_device) == (1, 1)


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
            os.write(write, repr(logged(client)).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1000) == b"[(9, {'child': 1.0})]"
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
