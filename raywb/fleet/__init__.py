"""The fleet collector: the recent runs of one W&B project as 20 metrics.

    raywb fleet --verbose                 prints them
    raywb fleet --push --every 15m        sends them to Datadog, again and again

wandb_runs.py      a process of its own: W&B's client, and nothing else
reading.py         which pages to ask for      wandb_process.py  runs that process, and ends it
runs.py            a run as the collector sees it, and the window
metrics.py         the 20 definitions          details.py   what stands behind them
collector.py       one collection              cycle.py     with its outlets, once or at intervals
outlets.py         Datadog, file, Ray's        scrape.py    an endpoint for Prometheus
credentials.py     keys: environment, AWS      on_cluster.py  an actor beside the service

From Python: ``collect(FleetSettings(), credentials, Deadline(120.0), ...)`` gives a
:class:`FleetReport`, and ``run_once(settings, outlets, environment)`` does all of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raywb.fleet.collector import FleetReport, FleetSettings, collect
    from raywb.fleet.credentials import Credentials, find_credentials
    from raywb.fleet.cycle import Outcome, run_once
    from raywb.fleet.deadline import Deadline

__all__ = [
    "Credentials",
    "Deadline",
    "FleetReport",
    "FleetSettings",
    "Outcome",
    "collect",
    "find_credentials",
    "run_once",
]

_HOMES = {
    "Credentials": "credentials",
    "Deadline": "deadline",
    "FleetReport": "collector",
    "FleetSettings": "collector",
    "Outcome": "cycle",
    "collect": "collector",
    "find_credentials": "credentials",
    "run_once": "cycle",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"raywb.fleet.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'raywb.fleet' has no attribute {name!r}")
