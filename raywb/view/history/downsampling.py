"""A series at the resolution of a chart: least, greatest and mean value of each stretch of x."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from raywb.view.history.columns import Points

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

__all__ = ["Buckets", "downsample"]


class Buckets(NamedTuple):
    """What a chart draws: x ascends; what is not finite is left to the JSON as null.

    Attributes:
        points: how many values lie in the range.
        last: the value at the greatest x in it, of equal x the newest; None where there is none.
    """

    x: list[float]
    low: list[float]
    high: list[float]
    mean: list[float]
    points: int
    last: float | None


def downsample(
    x: Floats, points: Points, limit: int, begin: float | None, end: float | None
) -> Buckets:
    """Bring a series to at most ``limit`` buckets of the same width in x.

    Values stay as they are where no more than ``limit`` of them lie in the range. Else each
    bucket has the true least and greatest of its finite values, their mean, and stands at the
    mean of their x.

    Args:
        x: of each point; points whose x is not finite are left out.
        points: the series, in order of row numbers; of equal x the order stays.
        limit: most buckets.
        begin: least x; None is open.
        end: greatest x, which belongs to the range; None is open.
    """
    here = np.isfinite(x)
    if begin is not None:
        here &= x >= begin
    if end is not None:
        here &= x <= end
    if not here.all():
        x, points = x[here], points.at(here)
    if (x[1:] < x[:-1]).any():
        order = np.argsort(x, kind="stable")
        x, points = x[order], points.at(order)
    count = int(points.weight.sum())
    last = float(points.total[-1] / points.weight[-1]) if len(x) else None
    if len(x) <= limit:
        low, high, mean = points.low, points.high, points.total / points.weight
        return Buckets(x.tolist(), low.tolist(), high.tolist(), mean.tolist(), count, last)
    low, high, total = points.low, points.high, points.total
    weight = points.weight
    finite = np.isfinite(total)
    if not finite.all():
        low, high = np.where(finite, low, np.nan), np.where(finite, high, np.nan)
        total, weight = np.where(finite, total, 0.0), np.where(finite, weight, 0.0)
    starts = _starts(x, limit)
    weights = np.add.reduceat(weight, starts)
    sizes = np.diff(starts, append=len(x))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(total, starts) / weights
    low, high = np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
    return Buckets(
        # A mean of times since the epoch keeps its digits when it is taken of differences.
        (x[starts] + np.add.reduceat(x - np.repeat(x[starts], sizes), starts) / sizes).tolist(),
        low.tolist(),
        high.tolist(),
        # The mean of a rounded sum may lie a hair outside of its bucket's values.
        np.clip(mean, low, high).tolist(),
        count,
        last,
    )


def _starts(x: Floats, limit: int) -> npt.NDArray[np.intp]:
    """Where the buckets begin: stretches of x of equal width, those that are empty left out."""
    width = float(x[-1] - x[0])
    if not 0 < width < np.inf:
        return np.linspace(0, len(x), limit, endpoint=False).astype(np.intp)
    bucket = np.minimum(((x - x[0]) * (limit / width)).astype(np.int64), limit - 1)
    return np.flatnonzero(np.diff(bucket, prepend=-1))
