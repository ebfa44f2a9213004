"""What goes into a report: the answers of the page's API, down-sampled until they fit."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["FEWEST_POINTS", "MOST_POINTS", "MOST_SERIES", "Contents", "Source", "collect"]

#: Points of one series, as the page asks for them of a server.
USUAL_POINTS = 600

#: Fewer show no course any more; that many a series has, however many series there are.
FEWEST_POINTS = 50

#: Points of all series together: about 10 MB of file.
MOST_POINTS = 250_000

#: Series in one file; a page that lists more helps nobody.
MOST_SERIES = MOST_POINTS // FEWEST_POINTS

#: Series that are asked for at a time.
_KEYS_AT_ONCE = 100


class Source(Protocol):
    """What knows a run: answers as the page's API does, as plain dicts and lists."""

    def overview(self) -> dict[str, Any]:
        """Return what ``api/overview`` answers."""
        ...

    def series(self, run: int) -> dict[str, Any]:
        """Return what ``api/series`` answers."""
        ...

    def points(self, run: int, keys: Sequence[str], points: int) -> dict[str, Any]:
        """Return what ``api/points`` answers, over the series' own axes."""
        ...


@dataclass(frozen=True)
class Contents:
    """What a report shows.

    Attributes:
        overview: as the API answers it.
        series: by number of the run, as a string: what the API answers.
        points: by number of the run and key: one entry of ``series`` of the API's answer.
        points_per_series: most points that a series has here.
        thinned_series: series that have more points than are shown.
        left_out_series: series beyond :data:`MOST_SERIES`.
    """

    overview: dict[str, Any]
    series: dict[str, dict[str, Any]]
    points: dict[str, dict[str, dict[str, Any]]]
    points_per_series: int
    thinned_series: int = 0
    left_out_series: int = 0

    @property
    def shown_series(self) -> int:
        """How many series it has, over all runs."""
        return sum(len(answer["series"]) for answer in self.series.values())

    @property
    def rows(self) -> int:
        """How many rows its runs have."""
        return sum(int(run.get("rows") or 0) for run in self.overview["runs"])

    def as_json(self) -> dict[str, Any]:
        """What the page finds in the file."""
        return {"overview": self.overview, "series": self.series, "points": self.points}


def collect(source: Source, points: int | None = None) -> Contents:
    """Ask a source for everything that a report shows.

    Args:
        source: knows the runs.
        points: most points of a series; by default as many as the page would ask for, and fewer
            of very many series, so that all of them fit into :data:`MOST_POINTS`.
    """
    # A file does not change, whoever was at work when it was written.
    overview = source.overview() | {"now_s": time.time(), "live": False}
    found: dict[int, dict[str, Any]] = {}
    room, left_out = MOST_SERIES, 0
    for run in overview["runs"]:
        answer = source.series(run["number"])
        shown = answer["series"][:room]
        room -= len(shown)
        left_out += len(answer["series"]) - len(shown)
        found[run["number"]] = {**answer, "series": shown}
    count = sum(len(answer["series"]) for answer in found.values())
    if points is None:
        points = max(FEWEST_POINTS, min(USUAL_POINTS, MOST_POINTS // max(count, 1)))
    charts = {
        str(number): _points(source, number, answer["series"], points)
        for number, answer in found.items()
    }
    return Contents(
        overview=overview,
        series={str(number): answer for number, answer in found.items()},
        points=charts,
        points_per_series=points,
        thinned_series=sum(
            one["points"] > len(one["x"]) for run in charts.values() for one in run.values()
        ),
        left_out_series=left_out,
    )


def _points(
    source: Source, run: int, series: Sequence[Mapping[str, Any]], points: int
) -> dict[str, dict[str, Any]]:
    keys = [one["key"] for one in series]
    found = {}
    for begin in range(0, len(keys), _KEYS_AT_ONCE):
        answer = source.points(run, keys[begin : begin + _KEYS_AT_ONCE], points)
        for key, one in answer["series"].items():
            found[key] = {
                **one,
                "x": [_short(value, 15) for value in one["x"]],
                **{name: [_short(v, 9) for v in one[name]] for name in ("min", "max", "mean")},
                "last": _short(one["last"], 9),
            }
    return found


def _short(value: float | None, digits: int) -> float | int | None:
    """A number in as few characters as show it: nobody sees more than nine digits of a curve."""
    if value is None or not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.{digits}g}")
