"""A run as the collector sees it: what is asked for, cleaned of what cannot be counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

__all__ = ["CONFIG_KEYS", "ENDED", "SPS_KEYS", "FleetRun", "Window", "run_from_node"]

#: The only keys of a summary that are asked for: steps and samples per second.
SPS_KEYS = (
    "overview/steps_per_second",
    "overview/epoch_steps_per_second",
    "overview/sps",
    "timing_cumulative/sps",
    "timing_per_epoch/sps",
)

#: Where a run says how many GPUs it has: its own, and those of the cluster that it stands for.
GPU_KEYS = ("compute.gpu_count", "cluster.gpu_count")

#: What is asked for of a config: a name with a dot is a key, or a path into a nested one.
CONFIG_KEYS = (*GPU_KEYS, *(key.partition(".")[0] for key in GPU_KEYS))

#: States in which a run is over and its last heartbeat was its end.
ENDED = frozenset({"finished", "failed", "crashed", "killed", "preempted"})

#: How often a JSON text may lie in a JSON text: W&B's server has been seen to hand out a crashed
#: run's summary as a text within the text.
_MOST_WRAPPINGS = 3


class FleetRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a project.

    Attributes:
        id: its id on W&B's server.
        name: the name that it shows.
        state: W&B's word for its state.
        created_s: when it began, in seconds since the epoch; None where that cannot be read.
        heartbeat_s: when it was last heard of, likewise.
        sweep: the sweep that it belongs to.
        sps: the values of :data:`SPS_KEYS` that are numbers.
        unusable: the keys among these that are there, and are no numbers.
        gpus: the recorded number of GPUs; None where there is none.
    """

    id: str
    name: str
    state: str
    created_s: float | None = None
    heartbeat_s: float | None = None
    sweep: str | None = None
    sps: dict[str, float] = {}
    unusable: tuple[str, ...] = ()
    gpus: float | None = None

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.state in ENDED

    @property
    def duration_s(self) -> float | None:
        """From its beginning to its last heartbeat; None before its end.

        Also None where the heartbeat lies before the beginning: then two clocks disagree, and
        nobody knows how long the run took.
        """
        if not self.ended or self.created_s is None or self.heartbeat_s is None:
            return None
        duration_s = self.heartbeat_s - self.created_s
        return duration_s if duration_s >= 0 else None


class Window(msgspec.Struct, frozen=True):
    """The time of which the metrics tell, in seconds since the epoch.

    It has no end for runs: one that another clock dates into the future belongs to it.
    """

    start_s: float
    end_s: float

    @classmethod
    def until(cls, now_s: float, hours: float) -> Window:
        """The window of so many hours up to now, in whole seconds, as W&B's times are."""
        end_s = math.floor(now_s)
        return cls(end_s - round(hours * 3600), end_s)

    @property
    def hours(self) -> float:
        """How long it is."""
        return (self.end_s - self.start_s) / 3600

    @property
    def start(self) -> str:
        """Its start as an ISO time in UTC."""
        return iso_time(self.start_s)

    @property
    def end(self) -> str:
        """Its end, likewise."""
        return iso_time(self.end_s)

    def has(self, run: FleetRun) -> bool:
        """Whether a run was created in it, was last heard of in it, or still runs."""
        times = (run.created_s, run.heartbeat_s)
        return run.state == "running" or any(at is not None and at >= self.start_s for at in times)


def iso_time(time_s: float) -> str:
    """Seconds since the epoch as W&B writes times.

    With the Z: with an offset in its place, a filter on times is said to find nothing.
    """
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def run_from_node(node: Mapping[str, Any]) -> FleetRun:
    """Read one run as W&B's GraphQL gives it; what cannot be read is left out."""
    summary = _object(node.get("summaryMetrics"))
    values = {key: _number(summary[key]) for key in SPS_KEYS if summary.get(key) is not None}
    return FleetRun(
        id=str(node["name"]),
        name=str(node.get("displayName") or node["name"]),
        state=str(node.get("state") or "unknown"),
        created_s=_seconds(node.get("createdAt")),
        heartbeat_s=_seconds(node.get("heartbeatAt")),
        sweep=node.get("sweepName") or None,
        sps={key: value for key, value in values.items() if value is not None},
        unusable=tuple(key for key, value in values.items() if value is None),
        gpus=_gpus(_object(node.get("config"))),
    )


def _object(value: Any) -> Mapping[str, Any]:
    """A JSON object, however often it is wrapped as a text."""
    for _ in range(_MOST_WRAPPINGS):
        if not isinstance(value, str | bytes):
            break
        try:
            value = json.loads(value, strict=False)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    """A finite number; of a metric that was defined with aggregates its last value, or mean.

    Strings are no numbers, whatever they say: W&B's server writes NaN as one.
    """
    if isinstance(value, Mapping):
        kinds = [value[kind] for kind in ("last", "mean") if kind in value]
        found = (_number(one) for one in kinds if not isinstance(one, Mapping))
        return next((one for one in found if one is not None), None)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _seconds(value: Any) -> float | None:
    """An ISO time as seconds since the epoch; one without a zone is UTC, as W&B's are."""
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _gpus(config: Mapping[str, Any]) -> float | None:
    """The recorded number of GPUs; of a process's share and its cluster's total the larger."""
    counts = [_number(_config_value(config, key)) for key in GPU_KEYS]
    return max((count for count in counts if count is not None and count >= 0), default=None)


def _config_value(config: Mapping[str, Any], key: str) -> Any:
    """A value of a config as it travels, ``{"lr": {"value": 0.1}}``, by key or by path."""
    value: Any = config.get(key)
    if value is None:
        place, _, name = key.partition(".")
        outer = config.get(place)
        inner = outer.get("value", outer) if isinstance(outer, Mapping) else None
        return inner.get(name) if isinstance(inner, Mapping) else None
    return value.get("value") if isinstance(value, Mapping) else value
