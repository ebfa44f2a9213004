"""Large pieces of a log, one after the other, in memory that is used again for each.

:meth:`raywb.service.append_log.AppendLog.read` copies every record, and comes upon every page of
the files; of a whole run that takes longer than to make columns of it. What is damaged is left to
it.
"""

from __future__ import annotations

from typing import NamedTuple

from raywb.service.append_log import AppendLog, Segment, is_undamaged, record_bounds

__all__ = ["LogPieces", "Piece"]


class Piece(NamedTuple):
    """Records that follow each other.

    Attributes:
        data: where they lie, until the next piece is read.
        records: where the data of each begin and end there.
        next_position: where the log goes on behind them.
    """

    data: memoryview
    records: list[tuple[int, int]]
    next_position: int


class LogPieces:
    """Reads a log piece by piece.

    Args:
        log: the log; it may grow meanwhile, and has to be refreshed by whoever owns it.
    """

    def __init__(self, log: AppendLog) -> None:
        self._log = log
        self._memory = bytearray()

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
            return Piece(memoryview(b""), [], self._log.end)
        offset = max(position - segment.start, 0)
        while True:
            data = self._fill(segment, offset, length)
            records = _records_in(data)
            if records:
                return Piece(data, records, segment.start + offset + records[-1][1])
            if offset + len(data) >= segment.size:
                return self._behind_damage(segment.start + offset)
            length *= 4  # a record that is longer, or damage that says so

    def _fill(self, segment: Segment, offset: int, length: int) -> memoryview:
        """Part of a file; to look at it in place would be to come upon its pages one by one."""
        length = min(length, segment.size - offset)
        if len(self._memory) < length:
            self._memory = bytearray(length)
        view = memoryview(self._memory)
        got = 0
        with open(segment.path, "rb", buffering=0) as file:
            file.seek(offset)
            while got < length and (more := file.readinto(view[got:length])):
                got += more
        return view[:got]

    def _behind_damage(self, position: int) -> Piece:
        """The next record that is whole, wherever it begins."""
        record = next(self._log.read(position), None)
        if record is None:
            return Piece(memoryview(b""), [], self._log.end)
        return Piece(memoryview(record.data), [(0, len(record.data))], record.next_position)


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
