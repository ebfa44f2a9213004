"""The ledger: each byte of a source once, in order, whatever is asked of it."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from raywb.service.ledger import Ledger

A = "a" * 32
B = "b" * 32


def bytes_of(ledger: Ledger, source_id: str) -> bytes:
    return b"".join(entry.data for entry in ledger.read(0) if entry.source_id == source_id)


def test_only_the_next_byte_is_taken(tmp_path: Path) -> None:
    """Late, repeated and early bytes change nothing, and the answer says where the source ends."""
    ledger = Ledger(tmp_path)
    assert ledger.append(A, 0, b"one") == 3
    assert ledger.append(A, 0, b"one") == 3
    assert ledger.append(A, 5, b"early") == 3
    assert ledger.append(A, 3, b"two") == 6
    assert ledger.append(B, 0, b"other") == 5
    assert bytes_of(ledger, A) == b"onetwo"
    assert bytes_of(ledger, B) == b"other"
    assert ledger.end_of("c" * 32) == 0


def test_a_gap_is_counted(tmp_path: Path) -> None:
    """What a source no longer has is counted as missing, also after a restart."""
    ledger = Ledger(tmp_path)
    ledger.append(A, 0, b"one")
    assert ledger.append(A, 10, b"two", after_gap=True) == 13
    assert ledger.missing_bytes == {A: 7}
    ledger.close()
    assert Ledger(tmp_path).missing_bytes == {A: 7}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_stream_arrives_once_in_spite_of_everything(
    tmp_path_factory, data: st.DataObject
) -> None:
    """Repeated, reordered and interrupted requests, and restarts, still give the stream once."""
    directory = tmp_path_factory.mktemp("ledger")
    stream = bytes(range(256))
    ledger = Ledger(directory, segment_bytes=100)
    for _ in range(data.draw(st.integers(1, 20))):
        if data.draw(st.booleans()):
            ledger.close()
            ledger = Ledger(directory, segment_bytes=100)
        offset = data.draw(st.integers(0, 255))
        length = data.draw(st.integers(0, 80))
        end = ledger.append(A, offset, stream[offset : offset + length])
        assert bytes_of(ledger, A) == stream[:end]
    while (end := ledger.end_of(A)) < len(stream):
        ledger.append(A, end, stream[end : end + 50])
    assert bytes_of(ledger, A) == stream


def test_durable_lags_until_a_sync(tmp_path: Path) -> None:
    """An acknowledged offset becomes durable only with a sync; after a restart all of it is."""
    ledger = Ledger(tmp_path)
    ledger.append(A, 0, b"one")
    assert ledger.durable_end_of(A) == 0
    sync = ledger.begin_sync()
    ledger.append(A, 3, b"two")
    ledger.end_sync(sync)
    assert ledger.durable_end_of(A) == 3
    ledger.sync()
    assert ledger.durable_end_of(A) == 6
    ledger.close()
    assert Ledger(tmp_path).durable_end_of(A) == 6
