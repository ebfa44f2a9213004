"""Answers about a run's series, in the shapes of the page's API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
        "series": [run.summary_of(key) for key in run.keys],
        **reader.reading(request.run),
    }


def answer_points(reader: OutboxReader, request: PointsRequest) -> dict[str, Any]:
    """The values of some series of a run; those that it does not have are left out."""
    run = reader.runs.get(request.run, RunHistory(request.run))
    series = {}
    for key in dict.fromkeys(request.keys):
        if not run.has(key):
            continue
        points = run.points(key)
        axis, x, points = _x_of(run, key, points, request.x)
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


def _x_of(
    run: RunHistory, key: str, points: Points, x: str
) -> tuple[str | None, npt.NDArray[np.float64], Points]:
    """The name of a series' x, its values, and the points that have one."""
    if x == "time":
        return None, points.times, points
    axis = run.axis_of(key) if x == "axis" else None
    if axis is None:
        return None, points.rows.astype(np.float64), points
    name, carried_on = axis
    steps = run.points(name)
    at = np.searchsorted(steps.rows, points.rows, side="right") - 1
    if carried_on:
        # W&B puts the last value of the axis into rows that lack it.
        here = at >= 0
    else:
        here = (at >= 0) & ((steps.rows[at] == points.rows) | (points.rows < run.thinned_rows))
    if not here.all():
        at, points = at[here], points.at(here)
    return name, steps.low[at], points
