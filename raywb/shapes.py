"""Rows that look like one that was checked before need no second check.

To ask of ten keys whether they are strings, and of ten values whether they are numbers, takes
longer than to encode them. The encoded row tells it at once: it has the same bytes as a row that
was checked, wherever those say what a key is or of which type a value is, and differs from it in
the bits of the numbers alone. Read as one large integer that is an ``and`` and a comparison.
"""

from __future__ import annotations

from typing import Any

from raywb.rows import ROW_TAG, encode

__all__ = ["NO_SHAPE", "Shape", "shape_of"]

#: A row longer than this gets no shape: a client keeps some of them in memory.
LONGEST_BYTES = 4096

#: What rows of one shape have in common: a mask of the bits that are the same, and these bits.
Shape = tuple[int, int]

#: Has no rows.
NO_SHAPE: Shape = (0, 1)


def shape_of(payload: bytes, channel: int, step: Any, metrics: dict[str, Any]) -> Shape | None:
    """The shape of an encoded row that was checked and found good.

    Returns:
        None for a row that is very long or has strings: a date is encoded as a string too, and
        only its type tells it from one.
    """
    if len(payload) > LONGEST_BYTES or str in map(type, metrics.values()):
        return None
    head = [b"\xff", *(b"\xff" * len(encode(part)) for part in (ROW_TAG, channel))]
    head += [_mask_of(encode(0.0)), _mask_of(encode(step))]
    body = []
    for key, value in metrics.items():
        body += [b"\xff" * len(encode(key)), _mask_of(encode(value))]
    # Between the two lies the map's own beginning, of one to five bytes.
    between = len(payload) - sum(map(len, head)) - sum(map(len, body))
    mask = b"".join([*head, b"\xff" * between, *body])
    bits = int.from_bytes(mask, "little")
    return bits, int.from_bytes(payload, "little") & bits


def _mask_of(value: bytes) -> bytes:
    """The mask of one encoded number, bool or None: its type is the same, its value is free."""
    first = value[0]
    if first < 0x80:  # a small integer
        return b"\x80"
    if first >= 0xE0:  # a small negative one
        return b"\xe0"
    if first in (0xC2, 0xC3):  # a bool
        return b"\xfe"
    return b"\xff" + bytes(len(value) - 1)
