"""One collection: credentials, runs, metrics, within one time limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from raywb.errors import RaywbError, SettingsError
from raywb.fleet.credentials import DEFAULT_SECRET, Credentials
from raywb.fleet.deadline import Deadline
from raywb.fleet.details import DetailRules, FleetDetails, compute_details, main_regex
from raywb.fleet.metrics import FleetRules, Metric, compute
from raywb.fleet.reading import Read, ReadRequest
from raywb.fleet.runs import FleetRun, Window
from raywb.fleet.wandb_process import read_runs

__all__ = ["FleetReport", "FleetSettings", "collect"]

#: Longest that a collection may take, in seconds, whatever the settings say.
MOST_LIMIT_S = 120.0


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection is to be like.

    Attributes:
        window_hours: how far back the window goes.
        rules: what can be set about the metrics.
        details: work out what stands behind them, too; None leaves it.
        secret_name: the secret in AWS Secrets Manager.
        limit_s: longest that everything may take, outlets included; at most 120.
        per_page: runs per request.
    """

    window_hours: float = 24.0
    rules: FleetRules = FleetRules()
    details: DetailRules | None = None
    secret_name: str = DEFAULT_SECRET
    limit_s: float = MOST_LIMIT_S
    per_page: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.limit_s <= MOST_LIMIT_S:
            raise SettingsError(
                f"limit_s={self.limit_s:g} cannot be used: it is above 0 and at most 120 seconds"
            )
        if not 0 < self.window_hours <= 24 * 366:
            raise SettingsError(
                f"window_hours={self.window_hours:g} cannot be used: it is above 0 and at most a "
                "year's"
            )
        if not 0 <= self.rules.assumed_gpus < math.inf:
            raise SettingsError(
                f"assumed_gpus={self.rules.assumed_gpus:g} cannot be used: it is finite, and 0 or "
                "above"
            )


class FleetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection found.

    Attributes:
        metrics: the values there are, in their order.
        runs: how many runs the window has.
        requests: how many requests W&B's server was asked.
        read_s: how long that took.
        notes: what the server refused, and how the collection went on without.
        incomplete: which runs are therefore missing.
        details: what stands behind the metrics, where that was asked for.
    """

    entity: str
    project: str
    window: Window
    metrics: list[Metric]
    runs: int
    requests: int
    read_s: float
    notes: list[str]
    incomplete: list[str]
    details: FleetDetails | None = None

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints: metrics and window, and the details where they were asked for."""
        window = {"hours": self.window.hours, "start": self.window.start, "end": self.window.end}
        answer: dict[str, Any] = {"metrics": self.metrics, "window": window}
        if self.details is not None:
            read = {"runs": self.runs, "requests": self.requests, "seconds": self.read_s}
            answer["details"] = self.details
            answer["read"] = {**read, "notes": self.notes, "incomplete": self.incomplete}
        return answer


def collect(
    settings: FleetSettings,
    credentials: Credentials,
    deadline: Deadline,
    *,
    environment: Mapping[str, str],
    now_s: float,
) -> FleetReport:
    """Read the runs of the window, and work out the metrics.

    Args:
        settings: what it is to be like.
        credentials: what it takes to be let in, and where.
        deadline: when the time for everything is over.
        environment: the process environment.
        now_s: the window's end, in seconds since the epoch.

    Raises:
        KeyRefused: W&B's server does not accept the key.
        ProjectUnknown: there is no such project, or the key may not see it.
        FleetTimeout: not everything had come in time.
        FleetError: the server gives no answer that can be used.
    """
    window = Window.until(now_s, settings.window_hours)
    details = settings.details
    request = ReadRequest(
        api_key=credentials.wandb_key.reveal(),
        base_url=credentials.base_url,
        entity=credentials.entity,
        project=credentials.project,
        window=window,
        per_page=settings.per_page,
        limit_s=settings.limit_s,
        baseline=main_regex(details.main) if details else "",
        baseline_runs=details.baseline_runs + 1 if details else 0,
    )
    try:
        read = read_runs(request, deadline, environment, redact=credentials.redact)
    except RaywbError as error:
        raise type(error)(credentials.redact(str(error))) from None
    runs = read.runs
    return FleetReport(
        entity=credentials.entity,
        project=credentials.project,
        window=window,
        metrics=compute(runs, window, settings.rules),
        runs=len(runs),
        requests=read.requests,
        read_s=read.elapsed_s,
        notes=[credentials.redact(note) for note in read.notes],
        incomplete=read.incomplete,
        details=_details(runs, read, window, settings),
    )


def _details(
    runs: list[FleetRun], read: Read, window: Window, settings: FleetSettings
) -> FleetDetails | None:
    if settings.details is None:
        return None
    earlier = read.baseline or []
    return compute_details(runs, earlier, window, settings.details, settings.rules.assumed_gpus)
