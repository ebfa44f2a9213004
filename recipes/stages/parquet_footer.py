"""Where a Parquet file's columns lie, read from its footer.

The footer is a Thrift struct in the compact protocol (apache/parquet-format, ``parquet.thrift``,
and apache/thrift, ``thrift-compact-protocol.md``). It is read here, and not by pyarrow, because
pyarrow's view of a column ends the process where a footer is damaged; its reader, which reads the
rows, does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FOOTER_DAMAGE", "ColumnChunk", "RowGroup", "row_groups"]

#: What reading a footer raises that is none, or damaged.
FOOTER_DAMAGE = (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError)

_Struct = dict[int, Any]


@dataclass(frozen=True)
class ColumnChunk:
    """The pages of a column in a row group."""

    #: The name of the top-level column.
    column: str
    begin: int
    end: int


@dataclass(frozen=True)
class RowGroup:
    """Rows that lie together."""

    rows: int
    chunks: tuple[ColumnChunk, ...]

    @property
    def begin(self) -> int:
        """Where its first byte lies; one without columns begins with the file."""
        return min((chunk.begin for chunk in self.chunks), default=0)


def row_groups(footer: bytes) -> list[RowGroup]:
    """Return the row groups that a footer describes; damage raises one of ``FOOTER_DAMAGE``."""
    metadata = _Reader(footer).struct()
    return [
        RowGroup(group[3], tuple(_chunk(column[3]) for column in group[1])) for group in metadata[4]
    ]


def _chunk(metadata: _Struct) -> ColumnChunk:
    begin, dictionary = metadata[9], metadata.get(11, 0)
    if 0 < dictionary < begin:
        begin = dictionary
    return ColumnChunk(metadata[3][0].decode(), begin, begin + metadata[7])


class _Reader:
    """Thrift's compact protocol: a struct becomes a dict of its fields' numbers."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def struct(self) -> _Struct:
        fields: _Struct = {}
        number = 0
        while kind := self._byte():
            delta, kind = kind >> 4, kind & 15
            number = number + delta if delta else self._integer()
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):  # in a list, a boolean is a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            return self._list()
        if kind == 11:
            return self._map()
        if kind == 12:
            return self.struct()
        raise ValueError(kind)

    def _list(self) -> list[Any]:
        header = self._byte()
        size = header >> 4 if header >> 4 < 15 else self._unsigned()
        return [self._value(header & 15) for _ in range(size)]

    def _map(self) -> list[Any]:
        size = self._unsigned()
        kinds = self._byte() if size else 0
        return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(size)]

    def _integer(self) -> int:
        raw = self._unsigned()
        return (raw >> 1) ^ -(raw & 1)

    def _unsigned(self) -> int:
        result = shift = 0
        while True:
            byte = self._byte()
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7
            if shift > 63:
                raise ValueError("no number is this long")

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _bytes(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._content):
            raise IndexError(self._at)
        return self._content[self._at - size : self._at]
