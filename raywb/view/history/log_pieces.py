"""Large pieces of a log, one after the other, in memory that is used again for each.

:meth:`raywb.service.append_log.AppendLog.read` copies every record; of a whole run that takes
longer than to make columns of it. What is damaged is left to it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from raywb.service.append_log import AppendLog, Segment, is_undamaged, record_bounds

__all__ = ["SPARE_BYTES", "LogPieces", "Piece"]

#: Bytes behind a piece that may be looked at, and mean nothing.
SPARE_BYTES = 256


class Piece(NamedTuple):
    """Records that follow each other.

    Attributes:
        data: where they lie, until the next piece is read.
        records: where the data of each begin and end there.
        next_position: where the log goes on behind them.
    """

    data: bytearray
    records: list[tuple[int, int]]
    next_position: int


class LogPieces:
    """Reads a log piece by piece.

    Args:
        log: the log; it may grow meanwhile, and has to be refreshed by whoever owns it.
    """

    def __init__(self, log: AppendLog) -> None:
        self._log = log
        self._data = bytearray()

    def read(self, position: int, length: int) -> Piece:
        """Read on.

        Args:
            position: where the last piece ended.
            length: about how many bytes; one record at least, if there is one.

        Raises:
            OSError: the log cannot be read.
        """
        segment = next(self._log.segments(position), None)
        if segment is None:
            return Piece(self._data, [], self._log.end)
        offset = max(position - segment.start, 0)
        while True:
            got = self._fill(segment, offset, length)
            records = _records_in(memoryview(self._data)[:got])
            if records:
                return Piece(self._data, records, segment.start + offset + records[-1][1])
            if offset + got >= segment.size:
                return self._behind_damage(segment.start + offset)
            length *= 4  # a record that is longer, or damage that says so

    def _fill(self, segment: Segment, offset: int, length: int) -> int:
        length = min(length, segment.size - offset)
        if len(self._data) < length + SPARE_BYTES:
            self._data = bytearray(length + SPARE_BYTES)
        with open(segment.path, "rb") as file:
            file.seek(offset)
            view = memoryview(self._data)[:length]
            got = 0
            while got < length and (more := file.readinto(view[got:])):
                got += more
            os.posix_fadvise(file.fileno(), offset + got, length, os.POSIX_FADV_WILLNEED)
        return got

    def _behind_damage(self, position: int) -> Piece:
        """The next record that is whole, wherever it begins."""
        record = next(self._log.read(position), None)
        if record is None:
            return Piece(self._data, [], self._log.end)
        data = bytearray(record.data + bytes(SPARE_BYTES))
        return Piece(data, [(0, len(record.data))], record.next_position)


def _records_in(view: memoryview) -> list[tuple[int, int]]:
    """The whole records at the beginning of a piece."""
    records = []
    end = 0
    while (bounds := record_bounds(view, end)) is not None:
        begin, end = bounds
        if end > len(view) or not is_undamaged(view, begin, end):
            break
        records.append(bounds)
    return records
