"""The append log under ledger and outbox: damage costs what it hit, a torn end is cut off."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raywb.service.append_log import AppendLog


def contents(directory: Path) -> list[bytes]:
    log = AppendLog(directory)
    try:
        return [record.data for record in log.read(0)]
    finally:
        log.close()


def write(directory: Path, records: list[bytes], segment_bytes: int = 10**6) -> list[int]:
    """Write records and return the position after each one."""
    log = AppendLog(directory, segment_bytes=segment_bytes)
    positions = [log.append(record) for record in records]
    log.close()
    return positions


def test_records_come_back_over_segments_and_restarts(tmp_path: Path) -> None:
    """Records written over many segments and several openings are read in order, from anywhere."""
    records = [f"record {number}".encode() for number in range(60)]
    for start in range(0, 60, 20):
        write(tmp_path, records[start : start + 20], segment_bytes=200)
    assert len(os.listdir(tmp_path)) > 3
    log = AppendLog(tmp_path, segment_bytes=200)
    read = list(log.read(0))
    assert [record.data for record in read] == records
    middle = read[30].next_position
    assert [record.data for record in log.read(middle)] == records[31:]
    assert list(log.read(log.end)) == []


def test_parts_are_one_record(tmp_path: Path) -> None:
    """A record written in parts is read as one."""
    log = AppendLog(tmp_path)
    log.append(b"head", b"", b"body")
    assert contents(tmp_path) == [b"headbody"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_torn_end_never_costs_an_earlier_record(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut anywhere, the log opens with every record before the cut, and takes new ones."""
    directory = tmp_path_factory.mktemp("log")
    records = data.draw(st.lists(st.binary(max_size=30), min_size=1, max_size=8))
    positions = write(directory, records)
    cut = data.draw(st.integers(0, positions[-1]))
    os.truncate(directory / f"{0:020d}.log", cut)
    whole = [record for record, end in zip(records, positions, strict=True) if end <= cut]
    write(directory, [b"after"])
    assert contents(directory) == [*whole, b"after"]


def test_a_flipped_byte_costs_one_record(tmp_path: Path) -> None:
    """A damaged byte in the middle loses its own record only, and is counted once."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for round_number in range(40):
        directory = tmp_path / str(round_number)
        records = [bytes([number]) * chance.randrange(1, 50) for number in range(10)]
        positions = write(directory, records)
        path = directory / f"{0:020d}.log"
        content = bytearray(path.read_bytes())
        where = chance.randrange(positions[-2])
        content[where] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        hit = next(number for number, end in enumerate(positions) if where < end)
        log = AppendLog(directory)
        assert [record.data for record in log.read(0)] == records[:hit] + records[hit + 1 :]
        assert log.damaged == 1


def test_a_failed_write_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    """A write that the disk refuses raises, and what follows is read as if it had not been."""
    log = AppendLog(tmp_path)
    log.append(b"before")
    kept = os.dup(log._fd)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._fd)
    with pytest.raises(OSError, match="No space"):
        log.append(b"refused")
    os.dup2(kept, log._fd)
    log.append(b"after")
    assert [record.data for record in log.read(0)] == [b"before", b"after"]
