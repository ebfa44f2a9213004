"""Where the numbers lie in an encoded row: rows of one layout are read together, without decoding.

Rows that were logged by the same line of code differ in the bits of their numbers alone: keys,
their order and the type of each number are the same bytes. A layout is made of one such row; any
other row belongs to it when it has the same bytes wherever the mask says so, and then its numbers
lie at the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["MAX_BYTES", "Layout", "NumberAt", "NumbersAt", "layout_of"]

#: A longer row gets no layout, since layouts are kept in memory.
MAX_BYTES = 64 * 1024

#: First byte of an encoded number: type of its bytes, and how many they are.
_NUMBERS = {
    0xCB: (">f8", 8),
    0xCC: (">u1", 1),
    0xCD: (">u2", 2),
    0xCE: (">u4", 4),
    0xCF: (">u8", 8),
    0xD0: (">i1", 1),
    0xD1: (">i2", 2),
    0xD2: (">i4", 4),
    0xD3: (">i8", 8),
}

#: Bytes of an integer that is not negative, by its first byte.
_UINTS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}

#: Bytes of the length of a string, by its first byte.
_STRINGS = {0xD9: 1, 0xDA: 2, 0xDB: 4}


class NumberAt(NamedTuple):
    """A number's place in the row, its type there; a bool is the lowest bit of a byte."""

    offset: int
    dtype: str
    is_bool: bool = False


class NumbersAt(NamedTuple):
    """Numbers of one type at equal distances in the row, which are read together.

    Attributes:
        first: which of the row's numbers the first of them is.
        many: how many they are.
        offset: place of the first.
        distance: bytes from each to the next.
    """

    first: int
    many: int
    offset: int
    distance: int
    dtype: str
    is_bool: bool


class Layout(NamedTuple):
    """What rows of one layout have in common.

    Attributes:
        run: the number of their run.
        keys: keys of their numbers, in order.
        numbers: where these are, in order.
        time: where the time is.
        logged: where the number of ``log()`` calls is.
        width: length of the row in whole words of eight bytes, in bytes.
        words: the bits that are the same, as words; those that are free are 0.
        mask: which bits these are.
    """

    run: int
    keys: tuple[str, ...]
    numbers: tuple[NumbersAt, ...]
    time: NumberAt
    logged: NumberAt
    width: int
    words: npt.NDArray[np.uint64]
    mask: npt.NDArray[np.uint64]


class _Unexpected(Exception):
    """The row has something in it that is decoded one by one."""


class _Scan:
    """Walks over one encoded row, and notes which bits are free."""

    def __init__(self, row: bytes) -> None:
        self.row = row
        self.at = 0
        self.mask = bytearray(b"\xff" * len(row))

    def byte(self) -> int:
        self.at += 1
        return self.row[self.at - 1]

    def uint(self, length: int) -> int:
        self.at += length
        return int.from_bytes(self.row[self.at - length : self.at], "big")

    def free(self, length: int) -> int:
        begin = self.at
        self.mask[begin : begin + length] = bytes(length)
        self.at += length
        return begin

    def string_bytes(self, first: int) -> int | None:
        """Length of a string whose first byte was taken; None when it is no string."""
        if 0xA0 <= first <= 0xBF:
            return first & 0x1F
        if first in _STRINGS:
            return self.uint(_STRINGS[first])
        return None

    def number(self, first: int) -> NumberAt | None:
        """The place of a number whose first byte was taken; None when it is none."""
        here = self.at - 1
        if first <= 0x7F:
            self.mask[here] = 0x80
            return NumberAt(here, ">u1")
        if first >= 0xE0:
            self.mask[here] = 0xE0
            return NumberAt(here, ">i1")
        if first in (0xC2, 0xC3):
            self.mask[here] = 0xFE
            return NumberAt(here, ">u1", is_bool=True)
        if first not in _NUMBERS:
            return None
        dtype, length = _NUMBERS[first]
        return NumberAt(self.free(length), dtype)

    def expected_number(self) -> NumberAt:
        found = self.number(self.byte())
        if found is None or found.is_bool:
            raise _Unexpected
        return found

    def map_length(self) -> int:
        first = self.byte()
        if first & 0xF0 == 0x80:
            return first & 0x0F
        if first in (0xDE, 0xDF):
            return self.uint(2 if first == 0xDE else 4)
        raise _Unexpected


def layout_of(row: bytes) -> Layout | None:
    """The layout of an encoded :class:`raywb.service.outbox.OutRow`.

    Returns:
        None for what is no plain row of numbers and strings; it is to be decoded.
    """
    try:
        return _layout_of(row) if len(row) <= MAX_BYTES else None
    except (_Unexpected, IndexError, UnicodeDecodeError):
        return None


def _layout_of(row: bytes) -> Layout:
    import numpy as np

    scan = _Scan(row)
    if row[:2] != b"\x96\x00":
        raise _Unexpected
    scan.at = 2
    run = scan.byte()
    if run > 0x7F:
        if run not in _UINTS:
            raise _Unexpected
        run = scan.uint(_UINTS[run])
    if scan.byte() != 0xCB:
        raise _Unexpected
    time = NumberAt(scan.free(8), ">f8")
    numbers: dict[str, NumberAt] = {}
    count = scan.map_length()
    strings = set()
    for _ in range(count):
        length = scan.string_bytes(scan.byte())
        if length is None:
            raise _Unexpected
        scan.at += length
        key = row[scan.at - length : scan.at].decode()
        first = scan.byte()
        if (number := scan.number(first)) is not None:
            numbers[key] = number
        elif (length := scan.string_bytes(first)) is not None:
            scan.free(length)
            strings.add(key)
        else:
            raise _Unexpected
    logged = scan.expected_number()
    # A table behind it, or a key that is there twice, is for the decoder.
    if scan.byte() != 0xC0 or scan.at != len(row) or len(numbers) + len(strings) != count:
        raise _Unexpected
    width = -(-len(row) // 8) * 8
    padding = bytes(width - len(row))
    mask = np.frombuffer(bytes(scan.mask) + padding, np.uint64)
    return Layout(
        run=run,
        keys=tuple(numbers),
        numbers=tuple(_together(list(numbers.values()))),
        time=time,
        logged=logged,
        width=width,
        words=np.frombuffer(row + padding, np.uint64) & mask,
        mask=mask,
    )


def _together(numbers: list[NumberAt]) -> Iterator[NumbersAt]:
    """Those that follow each other and are alike, as one."""
    begin = 0
    while begin < len(numbers):
        offset, dtype, is_bool = numbers[begin]
        end = begin + 1
        distance = numbers[end].offset - offset if end < len(numbers) else 0
        while end < len(numbers) and numbers[end] == NumberAt(
            offset + (end - begin) * distance, dtype, is_bool
        ):
            end += 1
        yield NumbersAt(begin, end - begin, offset, distance, dtype, is_bool)
        begin = end
