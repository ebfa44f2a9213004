"""Answers about a run's series, in the shapes of the page's API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raywb.view.history.columns import Points
from raywb.view.history.downsampling import downsample
from raywb.view.history.outbox_reader import OutboxReader
from raywb.view.history.requests import PointsRequest, SeriesRequest
from raywb.view.history.run_history import RunHistory

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["answer_points", "answer_series"]


def answer_series(reader: OutboxReader, request: SeriesRequest) -> dict[str, Any]:
    """The list of a run's series, in order of first sight."""
    run = reader.runs.get(request.run, RunHistory(request.run))
    return {
        "run": request.run,
        "series": run.summaries(),
        **reader.reading(request.run),
    }


def answer_points(reader: OutboxReader, request: PointsRequest) -> dict[str, Any]:
    """The values of some series of a run; those that it does not have are left out."""
    run = reader.runs.get(request.run, RunHistory(request.run))
    series = {}
    axes = _Axes(run)
    for key in dict.fromkeys(request.keys):
        if not run.has(key):
            continue
        points = run.points(key)
        axis, x, points = _x_of(run, key, points, request.x, axes)
        buckets = downsample(x, points, request.points, request.begin, request.end)
        series[key] = {
            "axis": axis,
            "x": buckets.x,
            "min": buckets.low,
            "max": buckets.high,
            "mean": buckets.mean,
            "points": buckets.points,
            "last": buckets.last,
        }
    return {"run": request.run, "x": request.x, "series": series, **reader.reading(request.run)}


class _Axes:
    """Axes of one request: each is read once, and brought to the rows of a table once."""

    def __init__(self, run: RunHistory) -> None:
        self._run = run
        self._steps: dict[str, Points] = {}
        self._joined: dict[tuple[str, bool], list[_Joined]] = {}

    def join(self, name: str, carried_on: bool, rows: npt.NDArray[np.int64]) -> _Joined:
        """The axis at these rows."""
        joined = self._joined.setdefault((name, carried_on), [])
        for one in joined:
            if np.array_equal(one.rows, rows):
                return one
        if name not in self._steps:
            self._steps[name] = self._run.points(name)
        steps = self._steps[name]
        at = np.searchsorted(steps.rows, rows, side="right") - 1
        here = at >= 0
        if not carried_on:
            here &= (steps.rows[at] == rows) | (rows < self._run.thinned_rows)
        # W&B puts the last value of an axis that is carried on into rows that lack it.
        everywhere = bool(here.all())
        found = steps.low[at if everywhere else at[here]]
        joined.append(_Joined(rows, found, None if everywhere else here))
        return joined[-1]


class _Joined(NamedTuple):
    """An axis at some rows.

    Attributes:
        x: its values, of the rows that have one.
        here: which of the rows have one; None is all.
    """

    rows: npt.NDArray[np.int64]
    x: npt.NDArray[np.float64]
    here: npt.NDArray[np.bool_] | None


def _x_of(
    run: RunHistory, key: str, points: Points, x: str, axes: _Axes
) -> tuple[str | None, npt.NDArray[np.float64], Points]:
    """The name of a series' x, its values, and the points that have one."""
    if x == "time":
        return None, points.times, points
    axis = run.axis_of(key) if x == "axis" else None
    if axis is None:
        return None, points.rows.astype(np.float64), points
    name, carried_on = axis
    joined = axes.join(name, carried_on, points.rows)
    return name, joined.x, points if joined.here is None else points.at(joined.here)
