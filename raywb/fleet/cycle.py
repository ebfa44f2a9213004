"""A collection and its outlets, once or at intervals."""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raywb.errors import FleetError, RaywbError, SecretMissing, SettingsError
from raywb.fleet.collector import FleetReport, FleetSettings, collect
from raywb.fleet.credentials import Credentials, find_credentials
from raywb.fleet.deadline import Deadline
from raywb.fleet.outlets import DatadogOutlet, Outlet, publish

__all__ = ["Outcome", "parse_interval", "repeat", "run_once"]

#: Shortest pause from one collection's start to the next one's, in seconds.
SHORTEST_INTERVAL_S = 1.0

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Outcome:
    """How one cycle ended.

    Attributes:
        report: what was collected.
        failures: what went wrong, by outlet.
    """

    report: FleetReport
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every run was seen, and every outlet took the report."""
        return not self.failures and not self.report.incomplete


def run_once(
    settings: FleetSettings, outlets: Sequence[Outlet], environment: Mapping[str, str]
) -> Outcome:
    """Collect, and give it to every outlet, within one time limit.

    Credentials are looked for each time, so that one that was exchanged is found.

    Raises:
        FleetError: nothing was collected. Where that is an error of ours, its traceback is in the
            error's notes, with the keys masked.
    """
    deadline = Deadline(settings.limit_s)
    credentials = None
    try:
        credentials, failures = _find(settings, outlets, environment, deadline)
        report = collect(
            settings, credentials, deadline, environment=environment, now_s=time.time()
        )
        open_to = [outlet for outlet in outlets if outlet.name not in failures]
        return Outcome(report, failures | publish(report, open_to, credentials, deadline))
    except RaywbError:
        raise
    except Exception as error:  # noqa: BLE001 - told as ours, without the keys
        if credentials is None:  # nobody knows which of its words are keys
            raise FleetError(f"{type(error).__name__} while keys were looked for") from None
        told = FleetError(credentials.redact(f"{type(error).__name__}: {error}"))
        told.add_note(credentials.redact("".join(traceback.format_exception(error))))
        raise told from None


def _find(
    settings: FleetSettings,
    outlets: Sequence[Outlet],
    environment: Mapping[str, str],
    deadline: Deadline,
) -> tuple[Credentials, dict[str, str]]:
    """The credentials, and which outlets have to do without theirs.

    Raises:
        SecretMissing: W&B's are missing, or Datadog's are and no other outlet is there.
    """
    to_datadog = [outlet.name for outlet in outlets if isinstance(outlet, DatadogOutlet)]
    name = settings.secret_name
    try:
        found = find_credentials(environment, deadline, secret_name=name, datadog=bool(to_datadog))
    except SecretMissing as error:
        if not 0 < len(to_datadog) < len(outlets):
            raise
        found = find_credentials(environment, deadline, secret_name=name)
        return found, dict.fromkeys(to_datadog, found.redact(str(error)))
    return found, {}


def repeat(
    interval_s: float,
    cycle: Callable[[], Outcome],
    *,
    tell: Callable[[Outcome | RaywbError], None],
    ended: threading.Event,
) -> None:
    """Run cycles until ``ended``; one that fails is told, and the next one comes in its time.

    Args:
        interval_s: from one start to the next. A cycle that takes longer puts off the next.
        cycle: does it once.
        tell: is given each outcome, or the error.
        ended: set from elsewhere; a pause ends with it.
    """
    while not ended.is_set():
        began = time.monotonic()
        try:
            tell(cycle())
        except RaywbError as error:
            tell(error)
        except Exception as error:  # noqa: BLE001 - told by its name, since its text may have keys
            tell(FleetError(f"{type(error).__name__} {_place(error)}: the next one comes in time"))
        ended.wait(max(began + interval_s - time.monotonic(), 0.0))


def _place(error: Exception) -> str:
    """Where an error was raised, as a module's file and a line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {Path(last.filename).name}, line {last.lineno}"


def parse_interval(text: str) -> float:
    """``90s``, ``15m``, ``6h`` or ``1d`` in seconds.

    Raises:
        SettingsError: it is no such text, or too short a time.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    interval_s = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if interval_s < SHORTEST_INTERVAL_S:
        raise SettingsError(
            f"every={text!r} cannot be used: it is a number with s, m, h or d, as in 15m, and at "
            f"least {SHORTEST_INTERVAL_S:g}s"
        )
    return interval_s
