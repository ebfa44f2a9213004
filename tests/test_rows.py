"""Frames: what goes in comes out, and damage costs only what it hit."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raywb.errors import FrameError
from raywb.rows import (
    HEADER,
    ROW_TAG,
    Channel,
    ConfigUpdate,
    Counters,
    Define,
    End,
    Frame,
    Hello,
    Row,
    SummaryUpdate,
    decode,
    encode,
    frame,
    last_whole_frame,
    scan,
)

texts = st.text(max_size=20)
scalars = st.one_of(
    st.floats(allow_nan=False), st.integers(-(2**63), 2**64 - 1), st.booleans(), texts
)
messages = st.one_of(
    st.builds(
        Row,
        st.integers(0, 1000),
        st.floats(0, 1e10),
        st.one_of(st.none(), st.integers(0, 10**9), st.floats(0, 1e9)),
        st.dictionaries(texts, scalars, max_size=8),
    ),
    st.builds(Channel, st.integers(0, 9), st.none() | texts, st.none(), st.none(), texts, texts),
    st.builds(ConfigUpdate, st.integers(0, 9), st.dictionaries(texts, scalars, max_size=4)),
    st.builds(SummaryUpdate, st.integers(0, 9), st.dictionaries(texts, scalars, max_size=4)),
    st.builds(Define, st.integers(0, 9), texts, st.none() | texts, st.none() | texts),
    st.builds(Counters, st.integers(0, 99), st.dictionaries(texts, st.integers(0, 9), max_size=3)),
    st.builds(End, st.floats(0, 1e10)),
    st.builds(
        Hello, texts, texts, texts, st.integers(0, 9), st.integers(0, 9), texts, st.just(0.0), texts
    ),
)


def frames_of(data: bytes) -> list[bytes]:
    return [bytes(found.payload) for found in scan(data) if isinstance(found, Frame)]


@given(st.lists(messages, max_size=12))
def test_round_trip(sent: list[object]) -> None:
    """Messages come out of a buffer of frames as they went in, in order."""
    data = b"".join(frame(encode(message)) for message in sent)
    assert [decode(payload) for payload in frames_of(data)] == sent


def test_a_row_is_known_by_its_tag_alone() -> None:
    """The second byte of an encoded message tells a row from everything else."""
    assert encode(Row(3, 1.0, None, {"a": 1.0}))[1] == ROW_TAG
    assert encode(End(1.0))[1] != ROW_TAG


@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=3, max_size=8),
    st.data(),
)
def test_one_flipped_bit_costs_one_frame(payloads: list[bytes], data: st.DataObject) -> None:
    """A flipped bit anywhere loses the frame that it hit, and no other."""
    frames = [frame(payload) for payload in payloads]
    buffer = bytearray(b"".join(frames))
    bit = data.draw(st.integers(0, len(buffer) * 8 - 1))
    buffer[bit // 8] ^= 1 << (bit % 8)
    position = 0
    for hit, whole in enumerate(frames):  # noqa: B007 - the index is used after the loop
        position += len(whole)
        if bit // 8 < position:
            break
    survivors = payloads[:hit] + payloads[hit + 1 :]
    found = frames_of(bytes(buffer))
    assert [payload for payload in found if payload in survivors] == survivors
    assert any(not isinstance(piece, Frame) for piece in scan(bytes(buffer)))


@given(st.binary(max_size=300))
def test_garbage_never_raises(garbage: bytes) -> None:
    """Any bytes at all can be scanned, and every byte is accounted for once."""
    end = 0
    for piece in scan(garbage):
        assert piece.start == end
        assert piece.end > piece.start
        end = piece.end
    assert end == len(garbage)


def test_hostile_lengths_cost_bounded_work() -> None:
    """A buffer made of headers that promise much is given up within the bound on the work."""
    evil = HEADER.pack(0x5752, 1_000_000, 0) * 200_000
    assert all(not isinstance(piece, Frame) for piece in scan(evil))


def test_a_message_of_another_protocol_is_an_error_of_ours() -> None:
    """Bytes that are no message raise FrameError, whatever msgpack says of them."""
    for payload in (b"", b"\x93\x63\x01\x02", b"\xc1", b"\x91" * 10_000, msgspec.msgpack.encode(5)):
        with pytest.raises(FrameError, match="no message"):
            decode(payload)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.integers(0, 400))
def test_a_cut_falls_between_frames(payloads: list[bytes], cut: int) -> None:
    """Cutting a buffer for a batch leaves whole frames, and as many as fit."""
    frames = [frame(payload) for payload in payloads]
    buffer = b"".join(frames)[:cut]
    whole = last_whole_frame(buffer)
    ends = [sum(map(len, frames[:count])) for count in range(len(frames) + 1)]
    assert whole == max(end for end in ends if end <= len(buffer))


def test_a_cut_after_damage_splits_no_frame() -> None:
    """Cut in small batches behind a damaged header, every other frame still travels whole."""
    frames = [frame(bytes([number]) * 30) for number in range(20)]
    buffer = bytearray(b"".join(frames))
    buffer[len(frames[0]) * 3] ^= 0xFF
    survivors = []
    position = 0
    while position < len(buffer):
        chunk = bytes(buffer[position : position + 100])
        whole = last_whole_frame(chunk)
        survivors += frames_of(chunk[:whole])
        position += whole
    assert survivors == [bytes([number]) * 30 for number in range(20) if number != 3]
