"""Shapes of rows: what passes for a row that was checked is as good as that one."""

from __future__ import annotations

import datetime
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raywb.rows import ROW_TAG, Row, encode
from raywb.shapes import NO_SHAPE, Shape, shape_of

KEYS = st.text(max_size=4)
NUMBERS = st.floats() | st.booleans() | st.integers(-(2**63), 2**64 - 1)
NUMBERS |= st.sampled_from([0, 1, 127, 128, 255, 256, -1, -32, -33, 2**32])
STEPS = st.none() | st.floats() | st.integers(0, 2**40)


def same_length(length: int) -> st.SearchStrategy[Any]:
    """What nobody may log, encoded to this many bytes."""
    small = st.integers(0, 127)
    found: st.SearchStrategy[Any] = st.lists(small, min_size=length - 1, max_size=length - 1)
    found |= found.map(lambda numbers: "".join(map(chr, numbers)))
    if length == 1:
        found |= st.none()
    if length > 1:
        found |= st.binary(min_size=length - 2, max_size=length - 2)
    if length % 2:
        count = length // 2
        found |= st.dictionaries(small, small, min_size=count, max_size=count)
    return found


def row(channel: int, step: Any, metrics: Any) -> bytes:
    return encode((ROW_TAG, channel, 1.5, step, metrics))


def as_map(items: list[tuple[Any, Any]]) -> bytes:
    """A map with these items, some of whose keys could be none in Python."""
    beginning = encode({number: None for number in range(len(items))})
    head = len(beginning) - 2 * len(items)
    return beginning[:head] + b"".join(encode(part) for item in items for part in item)


def fits(payload: bytes, shape: Shape) -> bool:
    mask, fixed = shape
    return int.from_bytes(payload, "little") & mask == fixed


def test_a_tuple_is_a_row() -> None:
    """What log() encodes is what a Row is encoded to."""
    assert encode((ROW_TAG, 3, 1.5, None, {"x": 1})) == encode(Row(3, 1.5, None, {"x": 1}))


@given(st.integers(0, 2**17), STEPS, st.dictionaries(KEYS, NUMBERS, min_size=1, max_size=20))
def test_a_row_has_its_own_shape(channel: int, step: Any, metrics: dict[str, Any]) -> None:
    """A row of numbers fits its own shape, and so do others that differ in their floats alone."""
    payload = row(channel, step, metrics)
    shape = shape_of(payload, channel, step, metrics)
    assert shape is not None
    assert fits(payload, shape)
    other = {key: value / 3 if type(value) is float else value for key, value in metrics.items()}
    assert fits(encode((ROW_TAG, channel, 9e9, step, other)), shape)
    assert not fits(payload, NO_SHAPE)


@given(st.data())
def test_what_may_not_be_logged_does_not_fit(data: st.DataObject) -> None:
    """A value or a key that is no number or no string, encoded to as many bytes, is found out."""
    metrics = data.draw(st.dictionaries(KEYS, NUMBERS, min_size=1, max_size=20))
    step = data.draw(STEPS)
    payload = row(0, step, metrics)
    shape = shape_of(payload, 0, step, metrics)
    assert shape is not None
    key = data.draw(st.sampled_from(sorted(metrics)))
    value = data.draw(same_length(len(encode(metrics[key]))))
    other_key = data.draw(same_length(len(encode(key))).filter(lambda k: type(k) is not str))
    renamed = [(other_key if k == key else k, v) for k, v in metrics.items()]
    other_step = data.draw(same_length(len(encode(step))).filter(lambda s: s is not step))
    rows = [
        row(0, step, metrics | {key: value}),
        row(0, other_step, metrics),
        # A list stands for a key that cannot be one: its bytes are what counts.
        payload[: len(row(0, step, {})) - 1] + as_map(renamed),
    ]
    for other in rows:
        assert len(other) == len(payload)
        assert not fits(other, shape)


@pytest.mark.parametrize(
    "value", [datetime.date(2026, 1, 2), uuid.UUID(int=0), "as text"], ids=lambda v: str(v)
)
def test_strings_have_no_shape(value: Any) -> None:
    """A string's bytes may come from something else, so rows with strings are always checked."""
    metrics = {"x": 1.5, "text": str(value)}
    assert shape_of(row(0, 1, metrics), 0, 1, metrics) is None
