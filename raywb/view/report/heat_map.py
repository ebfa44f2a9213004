"""How busy each node was over time, as a grid: nodes below each other, time to the right."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from raywb.view.report.series import NODES_AXIS, Band

__all__ = ["MOST_NODES", "HeatMap", "node_heat_maps"]

#: Rows in one picture.
MOST_NODES = 64

_COLUMNS = 240

#: What is drawn, where there is any of it, and how it is called.
_WHAT = {
    "cpu_percent": "CPU",
    "memory_percent": "memory",
    "gpu_percent": "GPU",
    "gpu_memory_percent": "GPU memory",
}

#: What stands above the nodes: it is of all of them.
_OF_ALL = ("mean", "min", "max")

#: A reading holds until the next one, but for no longer than so many usual pauses.
_HOLDS = 2.5


@dataclass(frozen=True)
class HeatMap:
    """One percentage of all nodes.

    Attributes:
        what: as in the series' names.
        title: in words.
        nodes: names of the nodes, top down.
        from_s, to_s: the range, in seconds on the nodes' axis.
        values: a row for each node; NaN where nothing is known.
        left_out: nodes beyond :data:`MOST_NODES`.
    """

    what: str
    title: str
    nodes: list[str]
    from_s: float
    to_s: float
    values: list[list[float]]
    left_out: int


def node_heat_maps(bands: Iterable[Band]) -> list[HeatMap]:
    """Return a heat map for each percentage that nodes have in this run."""
    by_what: dict[str, dict[str, Band]] = {}
    for band in bands:
        parts = band.key.split("/")
        if band.axis == NODES_AXIS and len(parts) == 3 and parts[2] in _WHAT:
            by_what.setdefault(parts[2], {})[parts[1]] = band
    return [_heat_map(what, by_what[what]) for what in _WHAT if what in by_what]


def _heat_map(what: str, bands: dict[str, Band]) -> HeatMap:
    from_s = min(band.x[0] for band in bands.values())
    # The last reading holds for a while, too.
    to_s = max(band.x[-1] + (_pause_s(band) or 1.0) for band in bands.values())
    names = sorted(bands, key=lambda name: (name not in _OF_ALL, name))
    drawn = names[:MOST_NODES]
    return HeatMap(
        what=what,
        title=_WHAT[what],
        nodes=drawn,
        from_s=from_s,
        to_s=to_s,
        values=[_row(bands[name], from_s, to_s) for name in drawn],
        left_out=len(names) - len(drawn),
    )


def _pause_s(band: Band) -> float:
    """The usual time between two readings; 0 where there is only one."""
    pauses = [later - earlier for earlier, later in zip(band.x, band.x[1:], strict=False)]
    return statistics.median(pauses) if pauses else 0.0


def _row(band: Band, from_s: float, to_s: float) -> list[float]:
    """The value that held in the middle of each column."""
    longest_s = _HOLDS * (_pause_s(band) or math.inf)
    row, at = [], 0
    for column in range(_COLUMNS):
        middle_s = from_s + (column + 0.5) * (to_s - from_s) / _COLUMNS
        while at + 1 < len(band.x) and band.x[at + 1] <= middle_s:
            at += 1
        since_s = middle_s - band.x[at]
        row.append(band.mean[at] if 0 <= since_s <= longest_s else math.nan)
    return row
