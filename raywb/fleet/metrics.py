"""The 20 metrics, and how each follows from the runs of the window. Pure: no clock, no network.

A count is 0 where there is nothing to count, and so is the total of GPU-hours; a mean without a
value and a rate without a run are left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import msgspec

from raywb.fleet.runs import SPS_KEYS, FleetRun, Window

__all__ = ["METRICS", "FleetRules", "Metric", "compute"]

FAILED = frozenset({"failed", "crashed", "killed"})

#: States in which a run's throughput is one that was reached, not one on the way.
MEASURED = frozenset({"finished", "crashed"})

#: What in a name makes a run one of a sweep, as W&B's own attribute does.
SWEEP_MARK = ".sweep"

#: Prefix of the throughput metrics; the summary key follows, with dots for slashes.
_PUSH = "wandb.push_to_main."


class Metric(msgspec.Struct, frozen=True):
    """One value of the collector."""

    name: str
    value: int | float


class FleetRules(msgspec.Struct, frozen=True):
    """What can be set about the definitions.

    Attributes:
        push_to_main: glob of the names of push-to-main runs.
        assumed_gpus: GPUs of a run that recorded none.
    """

    push_to_main: str = "github.sky.*"
    assumed_gpus: float = 1.0


class _Kinds(NamedTuple):
    """The window's runs, sorted; a run may be of several kinds."""

    all: list[FleetRun]
    push: list[FleetRun]
    sweep: list[FleetRun]
    rules: FleetRules


_Value = int | float | None


def _count(runs: Iterable[FleetRun], states: Iterable[str]) -> int:
    return sum(run.state in states for run in runs)


def _completed(runs: Sequence[FleetRun]) -> int:
    return _count(runs, ("finished",))


def _failed(runs: Sequence[FleetRun]) -> int:
    return _count(runs, FAILED)


def _active(runs: Sequence[FleetRun]) -> int:
    return _count(runs, ("running",))


def _success_rate_pct(runs: Sequence[FleetRun]) -> float | None:
    ended = _completed(runs) + _failed(runs)
    return 100.0 * _completed(runs) / ended if ended else None


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    try:
        return statistics.fmean(there) if there else None
    except OverflowError:  # of the sum
        return math.fsum(value / len(there) for value in there)


def _avg_duration_hours(runs: Sequence[FleetRun]) -> float | None:
    duration_s = _mean(run.duration_s for run in runs)
    return None if duration_s is None else duration_s / 3600


def gpu_hours(runs: Iterable[FleetRun], assumed_gpus: float) -> float:
    """Duration × GPUs, summed over the runs that have ended."""
    seconds = (
        (run.duration_s or 0.0) * (assumed_gpus if run.gpus is None else run.gpus) for run in runs
    )
    return sum(seconds) / 3600


def _throughput(key: str) -> tuple[str, tuple[str, Callable[[_Kinds], _Value]]]:
    def mean(kinds: _Kinds) -> float | None:
        return _mean(run.sps.get(key) for run in kinds.push if run.state in MEASURED)

    meaning = f"mean of {key} over the push-to-main runs that finished or crashed"
    return _PUSH + key.replace("/", "."), (meaning, mean)


#: Every metric in the order in which it is shown: its meaning, and its value.
METRICS: dict[str, tuple[str, Callable[[_Kinds], _Value]]] = {
    "wandb.runs.active": ("runs that are running now", lambda k: _active(k.all)),
    "wandb.runs.completed_24h": ("runs that finished", lambda k: _completed(k.all)),
    "wandb.runs.failed_24h": (
        "runs that failed, crashed or were killed",
        lambda k: _failed(k.all),
    ),
    "wandb.runs.total_recent": ("runs of the window, active ones included", lambda k: len(k.all)),
    "wandb.training.avg_duration_hours": (
        "mean duration of the runs that ended",
        lambda k: _avg_duration_hours(k.all),
    ),
    "wandb.training.total_gpu_hours_24h": (
        "duration times GPUs of the runs that ended",
        lambda k: gpu_hours(k.all, k.rules.assumed_gpus),
    ),
    "wandb.push_to_main.runs_completed_24h": (
        "push-to-main runs that finished",
        lambda k: _completed(k.push),
    ),
    "wandb.push_to_main.runs_failed_24h": (
        "push-to-main runs that failed, crashed or were killed",
        lambda k: _failed(k.push),
    ),
    "wandb.push_to_main.success_rate_pct": (
        "share of the ended push-to-main runs that finished",
        lambda k: _success_rate_pct(k.push),
    ),
    "wandb.push_to_main.avg_duration_hours": (
        "mean duration of the push-to-main runs that ended",
        lambda k: _avg_duration_hours(k.push),
    ),
    **dict(_throughput(key) for key in SPS_KEYS),
    "wandb.sweep.runs_total_24h": ("runs of sweeps", lambda k: len(k.sweep)),
    "wandb.sweep.runs_completed_24h": (
        "runs of sweeps that finished",
        lambda k: _completed(k.sweep),
    ),
    "wandb.sweep.runs_failed_24h": (
        "runs of sweeps that failed, crashed or were killed",
        lambda k: _failed(k.sweep),
    ),
    "wandb.sweep.runs_active": ("runs of sweeps that are running now", lambda k: _active(k.sweep)),
    "wandb.sweep.success_rate_pct": (
        "share of the ended runs of sweeps that finished",
        lambda k: _success_rate_pct(k.sweep),
    ),
}


def is_push_to_main(run: FleetRun, pattern: str) -> bool:
    """Whether its name is one that the pipeline behind the main branch gives."""
    return fnmatchcase(run.name, pattern)


def is_sweep(run: FleetRun) -> bool:
    """Whether W&B says that it belongs to a sweep, or its name does."""
    return run.sweep is not None or SWEEP_MARK in run.name


def compute(runs: Iterable[FleetRun], window: Window, rules: FleetRules) -> list[Metric]:
    """The metrics that have something to say, in their order.

    Args:
        runs: runs of the project, each once; those outside the window are passed over.
        window: the time of which the metrics tell.
        rules: what can be set about the definitions.
    """
    within = [run for run in runs if window.has(run)]
    kinds = _Kinds(
        all=within,
        push=[run for run in within if is_push_to_main(run, rules.push_to_main)],
        sweep=[run for run in within if is_sweep(run)],
        rules=rules,
    )
    values = ((name, value(kinds)) for name, (_, value) in METRICS.items())
    return [
        Metric(name, value) for name, value in values if value is not None and math.isfinite(value)
    ]
