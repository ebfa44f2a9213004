"""A disk that is full: the training loop sees nothing of it, and each row is kept or counted.

The disks are small tmpfs mounts, so these tests need root, and say so where it is missing.
Each one ends with room again, and everything goes on without a restart. ``RAYWB_LONG=1`` makes
many more of the seeded rounds, ``RAYWB_SEED`` repeats them.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_service import LocalService
from ray_cluster import until
from small_disk import SmallDisk, small_disk
from wandb_file import read_runs

from raywb.client import Client
from raywb.errors import ServiceUnavailable
from raywb.journal import Journal
from raywb.rows import PROTOCOL
from raywb.service.outbox import Outbox, OutRow

# Read here, since each test runs without such variables.
LONG = bool(os.environ.get("RAYWB_LONG"))
SEED = os.environ.get("RAYWB_SEED")


@pytest.fixture
def dice() -> random.Random:
    """Random numbers from a seed that a failing test shows."""
    seed = int(SEED or random.SystemRandom().randrange(2**32))
    print(f"RAYWB_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def journals(tmp_path: Path, service: LocalService) -> Iterator[SmallDisk]:
    """A small disk under the journals; the service's own is as large as any."""
    with small_disk(tmp_path / "journals", 512 * 1024) as disk:
        yield disk
        service.close()


@pytest.fixture
def ledger(service: LocalService) -> Iterator[SmallDisk]:
    """A small disk under the service; the journals' own is as large as any."""
    with small_disk(service.directory, 4 * 1024 * 1024) as disk:
        yield disk
        service.close()


def rows_in_outbox(service: LocalService) -> dict[str, list[int]]:
    """The finished rows of the first run: what was logged as ``x``, by stage."""
    outbox = Outbox(service.directory / "outbox")
    found: dict[str, list[int]] = {}
    for batch in outbox.recover():
        for item in batch.items:
            for key, value in item.metrics.items() if isinstance(item, OutRow) else ():
                if key.endswith("/x"):
                    found.setdefault(key.removesuffix("/x"), []).append(value)
    outbox.close()
    return found


def log(client: Client, numbers: Iterator[int], count: int) -> None:
    for _ in range(count):
        client.log({"x": next(numbers), "padding": "p" * 50})


def test_rows_are_kept_or_counted(
    service: LocalService, journals: SmallDisk, dice: random.Random
) -> None:
    """Over rounds of a full journal disk: rows logged = rows in the run + rows counted, in order.

    A stage that is attached while the disk is full keeps its name, and a config that is set then
    takes effect once.
    """
    service.up()
    service.start(mode="disabled")
    logged: dict[str, int] = {}
    clients = {"s0": service.client("s0")}
    numbers = {"s0": iter(range(10**9))}
    wanted = {}
    for number in range(1, 200 if LONG else 12):
        journals.fill(but_bytes=dice.choice([0, 0, 4096, 40_000]))
        for _ in range(dice.randrange(1, 4)):
            stage = dice.choice(list(clients))
            log(clients[stage], numbers[stage], dice.randrange(1, 800))
            if dice.random() < 0.3:
                time.sleep(dice.uniform(0, 0.3))  # the shipping thread takes its turn
        if dice.random() < 0.5:
            stage = f"s{number}"
            connection = clients["s0"]._connection
            channel = connection.open_channel(stage, None, None)
            clients[stage] = Client(connection, channel, stage, clients["s0"].run)
            numbers[stage] = iter(range(10**9))
            log(clients[stage], numbers[stage], dice.randrange(1, 100))
        clients["s0"].config.update({f"round_{number}": number})
        wanted[f"round_{number}"] = number
        journals.free()
        if dice.random() < 0.7:
            stage = dice.choice(list(clients))
            log(clients[stage], numbers[stage], dice.randrange(1, 300))
        if dice.random() < 0.5:
            assert clients["s0"].flush(20.0)
    for stage, client in clients.items():
        client.log({"x": next(numbers[stage])})  # there is room: this one is in the run
        logged[stage] = client.stats.logged
    assert clients["s0"].flush(20.0)
    lost = clients["s0"].stats.lost
    assert set(lost) <= {"disk_full"}
    report = service.service.finish(20.0, 0)
    assert report.lost == lost
    fold = service.service._delivery.folds[1]
    assert fold.config == wanted
    assert fold.summary().get("raywb/lost/disk_full", 0) == lost.get("disk_full", 0)
    service.close()
    rows = rows_in_outbox(service)
    assert set(rows) == set(logged)
    assert sum(map(len, rows.values())) + lost.get("disk_full", 0) == sum(logged.values())
    assert sum(map(len, rows.values())) == report.received_rows
    for stage, values in rows.items():
        assert values == sorted(set(values)), stage
        assert values[-1] == next(numbers[stage]) - 1


def test_losses_reach_the_run(service: LocalService, journals: SmallDisk) -> None:
    """W&B's own file has the rows that were kept, in order, and the number of the others."""
    service.up()
    service.start()
    client = service.client("s")
    numbers = iter(range(10**9))
    log(client, numbers, 100)
    journals.fill()
    log(client, numbers, 3000)
    journals.free()
    log(client, numbers, 100)
    assert client.flush()
    lost = client.stats.lost["disk_full"]
    report = service.service.finish(60.0, 0)
    assert (report.complete, report.lost) == (True, {"disk_full": lost})
    (run,) = read_runs(service.directory).values()
    values = run.values("s/x")
    assert values[:100] == list(range(100))
    assert values[-100:] == list(range(3100, 3200))
    assert values == sorted(set(values))
    assert len(values) + lost == 3200
    assert run.summary["raywb/lost/disk_full"] == run.history[-1]["raywb/lost/disk_full"] == lost


def test_what_fills_the_disk_may_be_our_own(service: LocalService, journals: SmallDisk) -> None:
    """A journal that has filled its disk gives the room back when the service has its rows.

    Its segment would be given up only when it is full, which on this disk it never can be.
    """
    service.up()
    service.start(mode="disabled")
    client = service.client("s")
    service.down()
    numbers = iter(range(10**9))
    while not client.stats.lost:
        log(client, numbers, 100)
    lost = client.stats.lost["disk_full"]
    assert not journals.path.joinpath("filler").exists()
    service.up()
    assert client.flush(20.0)
    journal = client._connection.journal
    until("the room of the rows that are safe", lambda: not journal.wants_room, 10.0)
    log(client, numbers, 1000)
    assert client.stats.lost == {"disk_full": lost}
    assert client.flush(20.0)
    logged = next(numbers)
    assert service.service.finish(20.0, 0).received_rows == logged - lost


def test_losses_of_a_killed_process_are_counted(service: LocalService, journals: SmallDisk) -> None:
    """A process that is killed while its disk is full has left its losses on that disk."""
    service.up()
    service.start(mode="disabled")
    client = service.client("s")
    to_child, from_child = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        client._connection.after_fork_in_child()
        log(client, iter(range(10)), 10)
        os.write(from_child[1], b".")
        os.read(to_child[0], 1)
        log(client, iter(range(10, 1000)), 990)
        os.kill(os.getpid(), signal.SIGKILL)
    os.read(from_child[0], 1)
    journals.fill()
    os.write(to_child[1], b".")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    swept = service.sweep()
    assert (swept.journals, swept.removed, swept.failed) == (2, 1, {})
    report = service.service.finish(20.0, 0)
    assert report.lost["disk_full"] > 500
    assert report.received_rows + report.lost["disk_full"] == 1000


def test_losses_of_an_ended_process_are_counted(service: LocalService, journals: SmallDisk) -> None:
    """A source that ends while its disk is full leaves its journal to the sweep."""
    service.up()
    service.start(mode="disabled")
    client = service.client("s")
    log(client, iter(range(10)), 10)
    journals.fill()
    log(client, iter(range(10, 1000)), 990)
    client._connection.close(5.0)
    assert len(list(journals.path.glob("*/*/*/lock"))) == 1
    assert service.sweep().removed == 1
    report = service.service.finish(20.0, 0)
    assert report.lost["disk_full"] > 500
    assert report.received_rows + report.lost["disk_full"] == 1000


def test_a_journal_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """Each try on a disk without room or inodes leaves neither a file nor a descriptor behind."""
    for inodes in (1, 2, 3, 4, 100):
        with small_disk(tmp_path / str(inodes), 16 * 1024, inodes=inodes) as disk:
            if inodes == 100:
                disk.fill()
            before = [sorted(map(str, disk.path.rglob("*"))), len(os.listdir("/proc/self/fd"))]
            for _ in range(3):
                with pytest.raises(OSError, match=r"No space|disk is full"):
                    Journal(disk.path)
            assert [
                sorted(map(str, disk.path.rglob("*"))),
                len(os.listdir("/proc/self/fd")),
            ] == before


def test_a_full_ledger_delays_everything_and_loses_nothing(
    service: LocalService, ledger: SmallDisk
) -> None:
    """While the ledger's disk is full nothing is acknowledged; then all of it arrives."""
    service.up()
    service.start(mode="disabled")
    client = service.client("s")
    numbers = iter(range(10**9))
    for _ in range(3):
        log(client, numbers, 100)
        assert client.flush(20.0)
        acked = client.stats.acked_bytes
        ledger.fill()
        slowest = 0.0
        for _ in range(1000):
            began = time.perf_counter()
            log(client, numbers, 1)
            slowest = max(slowest, time.perf_counter() - began)
        assert not client.flush(0.5)
        print(f"slowest log() {slowest * 1e3:.2f} ms")
        stats = client.stats
        assert stats.acked_bytes - acked < 4096 + 2048  # what the last page had room for
        assert stats.backlog_bytes > 50_000
        assert (stats.lost, "disk is full" in (stats.last_error or "")) == ({}, True)
        assert "ledger takes nothing" in str(service.status().problems)
        ledger.free()
        assert client.flush(20.0)
        service.wait_for(lambda status: "takes nothing" not in str(status.problems))
    logged = next(numbers)
    report = service.service.finish(20.0, 0)
    assert (report.received_rows, report.lost, report.complete) == (logged, {}, True)
    service.close()
    assert rows_in_outbox(service) == {"s": list(range(logged))}


def test_a_finish_on_a_full_disk_says_so_and_comes_true_later(
    service: LocalService, ledger: SmallDisk
) -> None:
    """finish() that cannot write its cut ends in its time, says why, and can be called again."""
    service.up()
    service.start(mode="disabled")
    client = service.client("s")
    log(client, iter(range(50)), 50)
    assert client.flush(20.0)
    ledger.fill()
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match=r"cannot be ended: .*space.*raywb\.finish"):
        service.service.finish(2.0, 0)
    assert time.monotonic() - began < 5
    ledger.free()
    report = service.service.finish(20.0, 0)
    assert (report.received_rows, report.complete, report.lost) == (50, True, {})


def test_a_service_on_a_full_disk_comes_up_when_there_is_room(
    service: LocalService, ledger: SmallDisk
) -> None:
    """A restart on a full disk waits for room, and then listens where its clients look for it."""
    service.up()
    service.start(mode="disabled")
    address = service.status().address
    client = service.client("s")
    log(client, iter(range(10)), 10)
    assert client.flush(20.0)
    service.down()
    ledger.fill()
    with pytest.raises(AssertionError):
        service.up(join_s=2.5)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert service.service.join(PROTOCOL, 2.5)["address"] is None
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    ledger.free()
    assert service.service.join(PROTOCOL, 5.0)["address"] == address
    log(client, iter(range(10, 20)), 10)
    assert client.flush(20.0)
    assert service.service.finish(20.0, 0).received_rows == 20


def test_wandb_on_a_full_disk_gets_every_row_later(
    service: LocalService, ledger: SmallDisk, dice: random.Random
) -> None:
    """Where W&B's own files have no room, each row is in them once there is."""
    service.up(sink_deadline_s=5.0)
    service.start(sink_deadline_s=5.0)
    client = service.client("s")
    numbers = iter(range(10**9))
    log(client, numbers, 50)
    assert client.flush(20.0)
    service.wait_for(lambda status: status.sink.applied_rows >= 50)
    ledger.fill(but_bytes=dice.choice([8192, 40_000]))
    log(client, numbers, 2000)
    client.flush(dice.uniform(0.5, 2.5))
    ledger.free()
    log(client, numbers, 50)
    assert client.flush(20.0)
    report = service.service.finish(90.0, 0)
    assert (report.complete, report.received_rows) == (True, 2100), report
    (run,) = read_runs(service.directory).values()
    assert run.values("s/x") == list(range(2100))


def test_a_failed_sync_is_tried_again(tmp_path: Path) -> None:
    """What a sync could not force to the disk is covered by the next one, not forgotten."""
    from raywb.service.ledger import Ledger

    ledger = Ledger(tmp_path)
    ledger.append("a" * 32, 0, b"row")
    kept = os.dup(ledger._log._fd)
    reading, writing = os.pipe()
    os.dup2(writing, ledger._log._fd)  # a pipe cannot be synced
    for _ in range(2):
        with pytest.raises(OSError, match="Invalid argument"):
            ledger.sync()
        assert ledger.durable_end_of("a" * 32) == 0
    os.dup2(kept, ledger._log._fd)
    ledger.sync()
    assert ledger.durable_end_of("a" * 32) == 3
    os.close(reading)


def test_a_full_outbox_delays_the_run_and_nothing_else(service: LocalService) -> None:
    """While the outbox has no room rows are acknowledged all the same; then each is in it once."""
    service.directory.mkdir()
    with small_disk(service.directory / "outbox", 256 * 1024) as disk:
        service.up()
        service.start(mode="disabled")
        client = service.client("s")
        numbers = iter(range(10**9))
        for _ in range(2):
            disk.fill()
            for _ in range(5):
                log(client, numbers, 100)
                assert client.flush(20.0)
            service.wait_for(lambda status: "outbox takes nothing" in str(status.problems))
            disk.free()
            service.wait_for(lambda status: "takes nothing" not in str(status.problems))
        report = service.service.finish(20.0, 0)
        assert (report.received_rows, report.lost, report.complete) == (1000, {}, True)
        service.close()
        assert rows_in_outbox(service) == {"s": list(range(1000))}
