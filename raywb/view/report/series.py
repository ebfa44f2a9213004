"""What a picture draws of each series, and which series belong into one picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NODES_AXIS", "Band", "namespaces_of", "pipelines_of", "shown"]

#: Axis of what is read of the nodes.
NODES_AXIS = "nodes/time_s"

#: What raywb says of itself; the picture of the delivery shows it.
_OWN = "raywb/"

_PIPELINE_AXIS = "/pipeline_duration_s"

#: Of a pipeline: how fast it is, and where it stands. What its stages do comes behind that.
_THROUGHPUT = (
    "progress",
    "outputs_per_s",
    "inputs_processed_per_s",
    "num_outputs",
    "num_input_remaining",
    "bottleneck_stage_index",
)

#: Of a stage of a pipeline; all stages' speeds first.
_OF_A_STAGE = ("speed_tasks_per_s", "queue_in", "tasks_completed")

#: Of a stage that trains: what everybody looks at first, and what says how it went.
_FIRST = ("loss", "accuracy", "reward", "score")
_LAST = ("ranks", "slowest_rank", "rank_spread_s")


@dataclass(frozen=True)
class Band:
    """One series: a line, and how far its values are from it.

    Attributes:
        key: its name in the run.
        namespace: the part of it that other series share.
        axis: name of its x axis.
        x: ascending.
        low, high, mean: NaN where the series has no number.
    """

    key: str
    namespace: str
    axis: str
    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    mean: Sequence[float]

    @property
    def title(self) -> str:
        """The name without what the picture is called."""
        return self.key.removeprefix(f"{self.namespace}/").removeprefix("stage/")


def shown(answer: Mapping[str, Any], points: Mapping[str, Mapping[str, Any]]) -> list[Band]:
    """Return the series that have a point to draw, in their order.

    Args:
        answer: what ``api/series`` answers.
        points: their points, by key.
    """
    bands = []
    axes = {one["axis"] for one in answer["series"]}
    for one in answer["series"]:
        found = points.get(one["key"])
        if found is None or one["key"] in axes:
            continue
        band = Band(
            key=one["key"],
            namespace=_namespace(one),
            axis=one["axis"] or "row",
            x=found["x"],
            low=_numbers(found["min"]),
            high=_numbers(found["max"]),
            mean=_numbers(found["mean"]),
        )
        if any(map(math.isfinite, band.mean)):
            bands.append(band)
    return bands


def _namespace(one: Mapping[str, Any]) -> str:
    """What has an axis of its own belongs together: a stage."""
    stage = str(one["axis"] or "").rpartition("/")[0]
    return stage if stage and one["key"].startswith(f"{stage}/") else str(one["namespace"])


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def pipelines_of(bands: Iterable[Band]) -> dict[str, list[Band]]:
    """Return what is drawn of each pipeline, by its namespace."""
    ranked: dict[str, list[tuple[tuple[int, int], Band]]] = {}
    for place, band in enumerate(bands):
        if not band.axis.endswith(_PIPELINE_AXIS):
            continue
        name = band.axis.removesuffix(_PIPELINE_AXIS)
        rest = band.key.removeprefix(f"{name}/")
        what = rest.rpartition("/")[2]
        if rest in _THROUGHPUT:
            rank = _THROUGHPUT.index(rest)
        elif rest.startswith("stage/") and what in _OF_A_STAGE:
            rank = len(_THROUGHPUT) + _OF_A_STAGE.index(what)
        else:
            continue
        ranked.setdefault(name, []).append(((rank, place), _named(band, name)))
    return {name: [band for _, band in sorted(found)] for name, found in ranked.items()}


def _named(band: Band, namespace: str) -> Band:
    return Band(band.key, namespace, band.axis, band.x, band.low, band.high, band.mean)


def namespaces_of(bands: Iterable[Band]) -> dict[str, list[Band]]:
    """Return the series of each stage of the user's own, by namespace, losses first."""
    found: dict[str, list[Band]] = {}
    for band in bands:
        others = (band.axis.endswith(_PIPELINE_AXIS), band.axis == NODES_AXIS)
        if not any(others) and not band.key.startswith(_OWN):
            found.setdefault(band.namespace or "series", []).append(band)
    return {name: sorted(group, key=_rank) for name, group in found.items()}


def _rank(band: Band) -> int:
    if band.title in _LAST:
        return len(_FIRST) + 1
    return next((place for place, word in enumerate(_FIRST) if word in band.title), len(_FIRST))
