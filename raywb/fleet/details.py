"""What stands behind the metrics, for ``--verbose``: what was recorded and what assumed, whether
main became slower, and which runs only claim to be running.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import msgspec

from raywb.fleet.metrics import MEASURED, gpu_hours
from raywb.fleet.runs import SPS_KEYS, FleetRun, Window

__all__ = ["DetailRules", "FleetDetails", "SilentRun", "Throughput", "compute_details"]

#: Fewer earlier runs than this are no baseline.
FEWEST_BASELINE_RUNS = 3


class DetailRules(msgspec.Struct, frozen=True):
    """What can be set about the details.

    Attributes:
        main: glob of the names of main's own runs, which a pull request's are not.
        baseline_runs: with how many earlier runs of main the newest is compared.
        regression_pct: how far below their median is a regression.
        silent_after_s: after this, a run that was not heard of is said to be silent.
    """

    main: str = "github.sky.main.*"
    baseline_runs: int = 10
    regression_pct: float = 10.0
    silent_after_s: float = 3600.0


class Throughput(msgspec.Struct, frozen=True):
    """The newest run of main beside the median of those before it.

    Attributes:
        key: the summary's key.
        run: the newest run that has a value.
        baseline: the median of the earlier runs' values; None where they are too few.
        change_pct: how far the newest lies from it.
        regression: it lies further below than is allowed.
    """

    key: str
    run: str
    latest: float
    baseline: float | None
    baseline_runs: int
    change_pct: float | None
    regression: bool


class SilentRun(msgspec.Struct, frozen=True):
    """A run that claims to be running; ``silent_s`` is None where it was never heard of."""

    id: str
    name: str
    silent_s: float | None


class FleetDetails(msgspec.Struct, frozen=True):
    """What stands behind the metrics.

    Attributes:
        recorded_gpu_hours: from runs that recorded their GPUs.
        assumed_gpu_hours: from runs that did not.
        recorded_runs: how many ended runs with a duration recorded their GPUs.
        assumed_runs: how many did not.
        runs_without_duration: ended runs whose times cannot be read, or contradict each other.
        unusable: summary values that are no numbers, by key.
        throughput: main's, by key.
        silent: runs that claim to be running, longest silent first.
    """

    recorded_gpu_hours: float
    assumed_gpu_hours: float
    recorded_runs: int
    assumed_runs: int
    runs_without_duration: int
    unusable: dict[str, int]
    throughput: list[Throughput]
    silent: list[SilentRun]

    @property
    def regression(self) -> bool:
        """Whether main became slower in any of its measures."""
        return any(one.regression for one in self.throughput)


def compute_details(
    runs: Sequence[FleetRun],
    earlier: Iterable[FleetRun],
    window: Window,
    rules: DetailRules,
    assumed_gpus: float,
) -> FleetDetails:
    """Work out the details.

    Args:
        runs: the window's runs.
        earlier: further runs of main, which may be from before the window.
        window: the time of which the details tell; its end is now.
        rules: what can be set about them.
        assumed_gpus: GPUs of a run that recorded none.
    """
    measured = [run for run in runs if run.duration_s is not None]
    recorded = [run for run in measured if run.gpus is not None]
    assumed = [run for run in measured if run.gpus is None]
    unusable = [key for run in runs for key in run.unusable]
    known = {run.id: run for run in [*earlier, *runs]}
    main = [run for run in known.values() if fnmatchcase(run.name, rules.main)]
    return FleetDetails(
        recorded_gpu_hours=gpu_hours(recorded, assumed_gpus),
        assumed_gpu_hours=gpu_hours(assumed, assumed_gpus),
        recorded_runs=len(recorded),
        assumed_runs=len(assumed),
        runs_without_duration=sum(run.ended and run.duration_s is None for run in runs),
        unusable={key: unusable.count(key) for key in SPS_KEYS if key in unusable},
        throughput=_throughput(main, rules),
        silent=_silent(runs, window, rules.silent_after_s),
    )


def _throughput(main: Iterable[FleetRun], rules: DetailRules) -> list[Throughput]:
    dated = [run for run in main if run.state in MEASURED and run.created_s is not None]
    newest_first = sorted(dated, key=lambda run: run.created_s or 0.0, reverse=True)
    found = []
    for key in SPS_KEYS:
        having = [run for run in newest_first if key in run.sps]
        if not having:
            continue
        newest, values = having[0], [run.sps[key] for run in having[1 : rules.baseline_runs + 1]]
        latest = newest.sps[key]
        enough = len(values) >= FEWEST_BASELINE_RUNS
        median = statistics.median(values) if enough else None
        change_pct = 100.0 * (latest - median) / abs(median) if median else None
        if change_pct is not None and not math.isfinite(change_pct):
            change_pct = None
        slower = change_pct is not None and change_pct < -rules.regression_pct
        found.append(Throughput(key, newest.name, latest, median, len(values), change_pct, slower))
    return found


def _silent(runs: Iterable[FleetRun], window: Window, after_s: float) -> list[SilentRun]:
    silent = []
    for run in runs:
        heard_s = run.created_s if run.heartbeat_s is None else run.heartbeat_s
        silent_s = None if heard_s is None else window.end_s - heard_s
        if run.state == "running" and (silent_s is None or silent_s > after_s):
            silent.append(SilentRun(run.id, run.name, silent_s))
    return sorted(silent, key=lambda one: -(one.silent_s or 0.0))


def main_regex(glob: str) -> str:
    """A glob as a regular expression that RE2 understands; only ``*`` and ``?`` are special.

    A set in brackets becomes any one character: what fits too much is looked at again here.
    """
    simple = re.sub(r"\[[^\]]+\]", "?", glob)
    return f"^{re.escape(simple).replace(chr(92) + '*', '.*').replace(chr(92) + '?', '.')}$"
