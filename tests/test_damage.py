"""Torn and flipped bytes, anywhere: never a crash, never a good frame thrown away, all counted.

Each property damages real files as a bad disk would, and then reads them as the shipping thread,
the sweep and a restarted service do. ``RAYWB_LONG=1`` tries many more examples.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from raywb.journal import Journal, Segments
from raywb.rows import HEADER, Frame, scan

# Read here, since each test runs without such variables.
LONG = bool(os.environ.get("RAYWB_LONG"))

many = settings(
    max_examples=3000 if LONG else 150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

#: Payloads among which are some that look like the beginning of a frame.
payloads = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=40),
        st.just(HEADER.pack(0x5752, 30, 0) + b"like a frame"),
        st.just(b"RWRWRW"),
        st.binary(min_size=300, max_size=600),
    ),
    min_size=1,
    max_size=25,
)


@st.composite
def flips(draw: st.DrawFn, lengths: list[int], most: int = 3) -> list[tuple[int, int]]:
    """Bytes to change in pieces that lie one behind the other: where, and by which bits.

    Lengths are hit more often than they would be by chance: they lead a reader astray.
    """
    starts = itertools.accumulate(lengths[:-1], initial=0)
    anywhere = st.integers(0, sum(lengths) - 1)
    in_a_length = st.sampled_from([start + 2 for start in starts])
    places = draw(
        st.lists(st.one_of(anywhere, in_a_length), min_size=1, max_size=most, unique=True)
    )
    return [(place, draw(st.integers(1, 255))) for place in places]


def flip(paths: list[Path], changes: list[tuple[int, int]]) -> None:
    """Change bytes of several files, counted as if they were one."""
    for place, bits in changes:
        for path in paths:
            size = path.stat().st_size
            if place < size:
                content = bytearray(path.read_bytes())
                content[place] ^= bits
                path.write_bytes(content)
                break
            place -= size


def hit(lengths: list[int], changes: list[tuple[int, int]]) -> set[int]:
    """Which of several pieces that lie one behind the other the changes are in."""
    found = set()
    for place, _ in changes:
        for number, length in enumerate(lengths):
            if place < length:
                found.add(number)
                break
            place -= length
    return found


def read_all(segments: Segments, limit: int, *, final: bool) -> list[tuple[int, bytes]]:
    """The pieces that a shipper would send, each scanned by the service on its own."""
    offset, pieces = 0, []
    while True:
        begin, data = segments.read(offset, limit, final=final)
        if not data:
            return pieces
        assert begin >= offset
        pieces.append((begin, data))
        offset = begin + len(data)


def frames_in(pieces: list[tuple[int, bytes]]) -> tuple[list[bytes], int]:
    """Messages of whole frames, and how many stretches are damaged."""
    found, damaged = [], 0
    for _, data in pieces:
        for piece in scan(data):
            if isinstance(piece, Frame):
                found.append(bytes(piece.payload))
            else:
                damaged += 1
    return found, damaged


@many
@given(payloads, st.integers(20, 900), st.integers(30, 2000), st.booleans(), st.data())
def test_a_damaged_journal_costs_only_what_was_hit(
    tmp_path_factory: pytest.TempPathFactory,
    sent: list[bytes],
    segment_bytes: int,
    limit: int,
    final: bool,
    data: st.DataObject,
) -> None:
    """Flipped bytes lose the frames that they are in, and no other; each other one comes once.

    While its process lives, what follows the damage at the very end waits for the next frame.
    """
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, segment_bytes=segment_bytes)
    for payload in sent:
        journal.append(payload)
    segments = journal.segments
    paths = [segments.path(start) for start in segments.starts()]
    lengths = [HEADER.size + len(payload) for payload in sent]
    changes = data.draw(flips(lengths))
    lost = hit(lengths, changes)
    flip(paths, changes)
    if not final:
        journal.append(b"one more")
        sent = [*sent, b"one more"]
    journal.close(keep=True)
    pieces = read_all(segments, limit, final=final)
    survivors = [payload for number, payload in enumerate(sent) if number not in lost]
    found, damaged = frames_in(pieces)
    # A byte that is changed may uncover a whole frame within a payload: not with these ones.
    assert found == survivors
    assert damaged >= 1
    end = 0
    for begin, piece in pieces:
        assert begin == end, "bytes were passed over"
        end = begin + len(piece)
    assert end == segments.end()
    event(f"{len(lost)} frames hit")
    shutil.rmtree(directory)


@many
@given(payloads, st.integers(20, 900), st.integers(30, 2000), st.data())
def test_a_torn_journal_keeps_what_is_whole(
    tmp_path_factory: pytest.TempPathFactory,
    sent: list[bytes],
    segment_bytes: int,
    limit: int,
    data: st.DataObject,
) -> None:
    """Cut off in any segment, every frame before the cut and in later segments is read once."""
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, segment_bytes=segment_bytes)
    for payload in sent:
        journal.append(payload)
    segments = journal.segments
    start = data.draw(st.sampled_from(segments.starts()))
    size = segments.path(start).stat().st_size
    cut = data.draw(st.integers(0, size))
    os.truncate(segments.path(start), cut)
    journal.close(keep=True)
    survivors, position, torn = [], 0, False
    for payload in sent:
        end = position + HEADER.size + len(payload)
        torn = torn or position < start + cut < end
        if not start + cut < end <= start + size:
            survivors.append(payload)
        position = end
    for final in (False, True):
        found, damaged = frames_in(read_all(segments, limit, final=final))
        assert found == survivors
        seen = final or start != segments.starts()[-1]
        assert bool(damaged) == (torn and seen)
    shutil.rmtree(directory)
