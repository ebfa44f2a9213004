"""What a history's process is asked; who asks needs no arrays for that."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "DirectoryRequest",
    "PointsRequest",
    "Progress",
    "ProgressRequest",
    "Seen",
    "SeriesRequest",
]


class SeriesRequest(msgspec.Struct, frozen=True, tag="series"):
    """Which series a run has."""

    run: int


class PointsRequest(msgspec.Struct, frozen=True, tag="points"):
    """The values of some series.

    Attributes:
        points: most buckets of each.
        begin, end: range of x.
        x: ``axis`` is each series' own step axis, ``time`` seconds since the epoch, ``row``
            W&B's row number.
    """

    run: int
    keys: list[str]
    points: int = 600
    begin: float | None = None
    end: float | None = None
    x: Literal["axis", "time", "row"] = "axis"


class ProgressRequest(msgspec.Struct, frozen=True, tag="progress"):
    """How far the reading is, for one run, and what was read of all of them."""

    run: int


class DirectoryRequest(msgspec.Struct, frozen=True, tag="directory"):
    """What the directory says as a whole."""


class Seen(msgspec.Struct, frozen=True):
    """What was read of one run: its rows, their ``log()`` calls, time of the first and the last."""

    rows: int
    logged: int
    first_time_s: float | None
    last_time_s: float | None


class Progress(msgspec.Struct, frozen=True):
    """The answer to :class:`ProgressRequest`.

    Attributes:
        reading: rows of the run that were read, how many there are (a guess until all are read),
            and the number of the first row that is not thinned.
        runs: by number.
    """

    reading: dict[str, int]
    runs: dict[int, Seen]
