"""The journal: what append() took is there for whoever comes, in order and once."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raywb.found_journals import find_journals
from raywb.journal import Journal, Segments
from raywb.rows import Frame, frame, scan

SMALL = 200


def payloads_of(segments: Segments, offset: int = 0, limit: int = 64) -> list[bytes]:
    """Everything that a shipper would find from ``offset`` on."""
    found = []
    while True:
        begin, data = segments.read(offset, limit)
        if not data:
            return found
        found += [bytes(piece.payload) for piece in scan(data) if isinstance(piece, Frame)]
        offset = begin + len(data)


def test_rows_come_back_over_many_segments(tmp_path: Path) -> None:
    """Rows written over many segments are read back whole and in order, in small batches."""
    journal = Journal(tmp_path, segment_bytes=SMALL)
    rows = [f"row {number}".encode() * (number % 5 + 1) for number in range(100)]
    assert all(journal.append(row) for row in rows)
    assert len(journal.segments.starts()) > 5
    assert payloads_of(journal.segments) == rows
    assert journal.segments.end() == journal.end


def test_a_frame_longer_than_the_batch_is_read_whole(tmp_path: Path) -> None:
    """A batch limit below one frame's size does not stop the reader."""
    journal = Journal(tmp_path)
    journal.append(b"x" * 1000)
    journal.append(b"y")
    assert payloads_of(journal.segments, limit=16) == [b"x" * 1000, b"y"]


def test_only_durable_segments_are_deleted(tmp_path: Path) -> None:
    """An acknowledged segment stays until it is durable, and the last one always stays."""
    journal = Journal(tmp_path, segment_bytes=SMALL)
    for number in range(60):
        journal.append(f"row {number}".encode())
    starts = journal.segments.starts()
    journal.acknowledge(journal.end, durable=0)
    assert journal.segments.starts() == starts
    journal.acknowledge(journal.end, durable=starts[3])
    assert journal.segments.starts() == starts[3:]
    journal.acknowledge(journal.end, durable=journal.end)
    assert journal.segments.starts() == starts[-1:]
    assert journal.backlog_bytes == 0


def test_the_backlog_is_capped_and_counted(tmp_path: Path) -> None:
    """Beyond the cap rows are refused and counted; after an acknowledgement they are taken."""
    journal = Journal(tmp_path, segment_bytes=SMALL, backlog_cap_bytes=1000)
    taken = sum(journal.append(b"0123456789" * 3) for _ in range(200))
    assert journal.lost == {"backlog_cap": 200 - taken}
    assert 1000 <= journal.end <= 1000 + 2 * SMALL
    journal.acknowledge(journal.end, durable=journal.end)
    assert journal.append(b"again")
    assert payloads_of(journal.segments)[-1] == b"again"


def test_a_short_write_is_cut_off_and_counted(tmp_path: Path) -> None:
    """A disk that takes half a frame leaves whole frames only, and later rows are fine."""
    limit = 500
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from raywb.journal import Journal
journal = Journal(Path({str(tmp_path)!r}), "{"ab" * 16}")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
taken = sum(journal.append(b"r" * 90) for _ in range(20))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append(b"after")
print(taken, sum(journal.lost.values()))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["5", "15"]
    segments = Segments(tmp_path / ("ab" * 16))
    assert payloads_of(segments, limit=4096) == [b"r" * 90] * 5 + [b"after"]


def test_rows_outlive_a_killed_process(tmp_path: Path) -> None:
    """After SIGKILL the journal is free, and holds every row whose append() had returned."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from raywb.journal import Journal
journal = Journal(Path({str(tmp_path)!r}))
for number in range(1000):
    journal.append(str(number).encode())
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (found,) = find_journals(tmp_path)
    assert found.is_free
    assert payloads_of(found.segments) == [str(number).encode() for number in range(1000)]
    found.release(delete=True)
    assert os.listdir(tmp_path) == []


def test_a_living_process_keeps_its_journal(tmp_path: Path) -> None:
    """A journal in use is seen, but is not free; after close() with nothing left it is gone."""
    journal = Journal(tmp_path)
    journal.append(b"row")
    (found,) = find_journals(tmp_path)
    assert not found.is_free
    found.release()
    journal.acknowledge(journal.end, journal.end)
    journal.close()
    assert os.listdir(tmp_path) == []


def test_a_closed_journal_counts(tmp_path: Path) -> None:
    """append() after close() loses the row, says so, and does not raise."""
    journal = Journal(tmp_path)
    journal.append(b"kept")
    journal.close()
    assert not journal.append(b"late")
    assert journal.lost == {"after_close": 1}
    assert payloads_of(journal.segments) == [b"kept"]


def test_a_forked_child_does_not_free_its_parent(tmp_path: Path) -> None:
    """A child that leaves the inherited files alone frees neither the lock nor the content."""
    journal = Journal(tmp_path)
    journal.append(b"parent")
    pid = os.fork()
    if pid == 0:
        journal.abandon_in_child()
        os._exit(0 if not journal.append(b"child") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    (found,) = find_journals(tmp_path)
    assert not found.is_free
    found.release()
    journal.append(b"parent again")
    assert payloads_of(journal.segments) == [b"parent", b"parent again"]


def test_a_torn_end_is_not_read(tmp_path: Path) -> None:
    """What a process killed in the middle of a write leaves behind is not offered as a frame."""
    journal = Journal(tmp_path)
    journal.append(b"whole")
    with open(journal.segments.path(0), "ab") as file:
        file.write(frame(b"half of this")[:-3])
    assert payloads_of(journal.segments) == [b"whole"]


def test_directories_are_private(tmp_path: Path) -> None:
    """Neither the journal's directory nor its files can be read by anybody else."""
    journal = Journal(tmp_path / "base")
    for path in (tmp_path / "base", journal.directory, journal.segments.path(0)):
        assert path.stat().st_mode & 0o077 == 0, path


def test_strange_names_are_passed_over(tmp_path: Path) -> None:
    """Directories that are no journals, hidden ones among them, are left alone."""
    for name in (".abc", "x", "f" * 31, "F" * 32):
        (tmp_path / name).mkdir()
    assert list(find_journals(tmp_path)) == []
    assert list(find_journals(tmp_path / "missing")) == []
    assert len(os.listdir(tmp_path)) == 4


def test_a_directory_that_cannot_be_made_raises(tmp_path: Path) -> None:
    """Making a journal below a file is an OSError for the caller to handle."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Journal(tmp_path / "file" / "below")


@pytest.fixture
def _no_descriptors_stay() -> Iterator[None]:
    """An interrupt may come between the opening of a segment and the noting of its descriptor."""
    before = {int(name) for name in os.listdir("/proc/self/fd")}
    yield
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - before:
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.mark.usefixtures("_no_descriptors_stay")
def test_an_interrupt_in_the_middle_tears_nothing(tmp_path: Path) -> None:
    """Exceptions out of signal handlers neither shift an offset nor keep the lock."""

    class Interrupted(Exception):
        pass

    armed = False

    def interrupt(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupted

    journal = Journal(tmp_path, segment_bytes=20 * SMALL)
    before = signal.signal(signal.SIGALRM, interrupt)
    returned: list[int] = []
    interrupted = 0
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        number = len(returned) + interrupted
        try:
            armed = True
            # Just long enough to come anywhere in the middle of an append. It comes again, since
            # Python at times forgets a signal until there is another one.
            signal.setitimer(signal.ITIMER_REAL, 2e-6 + number % 50 * 4e-7, 0.01)
            journal.append(b"%d" % number)
            returned.append(number)
            while True:
                pass
        except Interrupted:
            interrupted += number not in returned[-1:]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert journal.end == journal.segments.end()
    ends: list[int] = []
    thread = threading.Thread(target=lambda: ends.append(journal.end))
    thread.start()
    thread.join(10.0)
    assert ends == [journal.end], "the lock is free for another thread"
    found = [int(row) for row in payloads_of(journal.segments, limit=4096) if row.isdigit()]
    assert found == sorted(set(found)), "each once, in order"
    assert set(returned) <= set(found)
    assert interrupted > 100, "this machine's timers are too slow for the test"


def test_a_journal_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """Without a descriptor for its lock or its segment, neither files nor descriptors stay."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for free in range(2):
        # The lowest numbers that are free, so that exactly so many can be opened.
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        fillers = []
        while (fd := os.dup(0)) < highest:
            fillers.append(fd)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + free, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                Journal(tmp_path / "base")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
        assert descriptors() == before
        assert list((tmp_path / "base").iterdir()) == []
    assert Journal(tmp_path / "base").append(b"x")
