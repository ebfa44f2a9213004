"""The kernel's OOM killer ends a worker in the middle of its work: every row is there."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_service import LocalService

from raywb.service.outbox import Outbox, OutRow

LIMIT_BYTES = 256 * 1024 * 1024

#: The two versions of the kernel's interface: where a group is made, the file of its limit, the
#: one that keeps it from swapping, and the one that counts kills.
PLACES = (
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.oom_control",
    ),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.swap.max", "memory.events"),
)


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup with a memory limit; skips the test where the machine gives none."""
    refusals = []
    for parent, limit, swap, _ in PLACES:
        path = parent / f"raywb-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError as error:
            refusals.append(f"{parent}: {error.strerror}")
            continue
        try:
            if not (path / limit).exists():  # a directory like any other
                refusals.append(f"{parent}: no {limit}")
                continue
            (path / limit).write_text(str(LIMIT_BYTES))
            if (path / swap).exists():
                (path / swap).write_text("0" if swap.endswith("max") else str(LIMIT_BYTES))
            yield path
            return
        except OSError as error:
            refusals.append(f"{parent}: {error.strerror}")
        finally:
            path.rmdir()
    pytest.skip(f"no memory limit can be set here: {'; '.join(refusals)}")


def kills_of(group: Path) -> int:
    """How often the kernel has killed in the group."""
    for _, _, _, counts in PLACES:
        with contextlib.suppress(FileNotFoundError):
            lines = dict(line.split() for line in (group / counts).read_text().splitlines())
            return int(lines["oom_kill"])
    raise AssertionError(f"{group} does not tell of kills")


@pytest.mark.parametrize("flushed", [True, False])
def test_rows_of_a_worker_killed_for_its_memory(
    service: LocalService, group: Path, flushed: bool
) -> None:
    """Each row whose log() had returned comes home by a sweep, in order and once.

    The worker logs and takes memory in turn, so that nothing but the kernel decides where it
    ends; how far it came it writes into memory that outlives it.
    """
    service.up()
    service.start(mode="disabled")
    client = service.client("s")
    returned = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        client._connection.after_fork_in_child()
        taken = []
        for number in range(2 * LIMIT_BYTES // 100_000):
            client.log({"x": number}, step=number)
            returned[:] = (number + 1).to_bytes(8, "little")
            if flushed and number == 50:
                client.flush(10.0)
            taken.append(b"x" * 100_000)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert kills_of(group) == 1
    rows = int.from_bytes(returned[:], "little")
    assert rows > 100
    swept = service.sweep()
    assert (swept.removed, swept.failed) == (1, {})
    report = service.service.finish(20.0, 0)
    # One more may be in the journal: it was killed between the write and its note of it.
    assert report.received_rows in (rows, rows + 1)
    # Killed in the middle of a write, whose log() never returned, it leaves a part of a frame.
    assert report.lost in ({}, {"damaged_frames": 1})
    assert not report.lost or report.received_rows == rows
    service.close()
    outbox = Outbox(service.directory / "outbox")
    values = [
        item.metrics["s/x"]
        for batch in outbox.recover()
        for item in batch.items
        if isinstance(item, OutRow) and "s/x" in item.metrics
    ]
    assert values == list(range(report.received_rows))
    outbox.close()
