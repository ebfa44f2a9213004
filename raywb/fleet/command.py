"""``raywb fleet``: the recent runs of a W&B project as 20 metrics."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from raywb.errors import (
    FleetError,
    FleetTimeout,
    KeyRefused,
    ProjectUnknown,
    RaywbError,
    SecretMissing,
    SettingsError,
)

if TYPE_CHECKING:
    from raywb.fleet.choice import OutletChoice
    from raywb.fleet.collector import FleetSettings
    from raywb.fleet.cycle import Outcome

__all__ = ["fleet"]

#: Exit codes, so that scripts can tell one trouble from another.
EXIT_KEY = 20
EXIT_PROJECT = 21
EXIT_TIMEOUT = 22
EXIT_SECRET = 23
EXIT_PARTIAL = 24

_CODES: dict[type[RaywbError], int] = {
    KeyRefused: EXIT_KEY,
    ProjectUnknown: EXIT_PROJECT,
    FleetTimeout: EXIT_TIMEOUT,
    SecretMissing: EXIT_SECRET,
    SettingsError: 2,
}

#: Errors that the next collection would meet as well.
_LASTING = (KeyRefused, ProjectUnknown, SecretMissing, SettingsError)

DEFAULT_EVERY = "15m"


@click.command()
@click.option("--window-hours", default=24.0, show_default=True, help="How far back to look.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--verbose", is_flag=True, help="Show what stands behind the metrics, too.")
@click.option("--push", is_flag=True, help="Send the metrics to Datadog (DD_API_KEY, DD_SITE).")
@click.option("--tag", "tags", multiple=True, metavar="KEY:VALUE", help="Add a tag at Datadog.")
@click.option("--openmetrics", metavar="FILE", help="Write the metrics to this file, too.")
@click.option(
    "--serve", metavar="[HOST:]PORT", help="Let Prometheus scrape /metrics here; goes with --every."
)
@click.option("--every", metavar="INTERVAL", help="Stay, and collect again and again, as in 15m.")
@click.option(
    "--on-cluster",
    is_flag=True,
    help="Collect in an actor on the Ray cluster, beside the service, every 15m or as --every "
    "says; ray.util.metrics has the metrics, too.",
)
@click.option("--stop", is_flag=True, help="With --on-cluster: end that actor.")
@click.option(
    "--push-to-main",
    default="github.sky.*",
    show_default=True,
    metavar="GLOB",
    help="Names of push-to-main runs.",
)
@click.option(
    "--assumed-gpus", default=1.0, show_default=True, help="GPUs of a run that recorded none."
)
@click.option(
    "--secret",
    "secret_name",
    default="dev/datadog/collectors/wandb",
    show_default=True,
    metavar="NAME",
    help="Secret in AWS Secrets Manager for what the environment lacks.",
)
@click.option(
    "--limit-s", default=120.0, show_default=True, help="Longest that everything may take."
)
def fleet(**given: Any) -> None:
    """Say how the recent runs of a W&B project fare, in 20 metrics.

    The project is WANDB_ENTITY's WANDB_PROJECT, read with WANDB_API_KEY; what of these the
    environment lacks is looked for in AWS Secrets Manager. Nothing is sent anywhere unless asked.

    Exit codes: 0 all is well, 1 W&B's server gives no answer, 2 wrong usage, 3 no Ray cluster,
    20 the key is not accepted, 21 there is no such project, 22 not done within the time, 23 a key
    or name is to be had nowhere, 24 a part is missing: of the runs, or an outlet.
    """
    try:
        _run(given)
    except (FleetError, SettingsError) as error:
        _complain(error, verbose=bool(given["verbose"]))
        sys.exit(next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1))


def _run(given: dict[str, Any]) -> None:
    from raywb.fleet.cycle import parse_interval, run_once
    from raywb.settings import process_environment

    if given["serve"] and not (given["every"] or given["on_cluster"]):
        raise SettingsError("serve needs every, or on-cluster: nobody can scrape what ends at once")
    if given["stop"] and not given["on_cluster"]:
        raise SettingsError("stop goes with on-cluster: `raywb fleet --on-cluster --stop`")
    settings, choice = _settings(given), _choice(given)
    interval_s = parse_interval(given["every"] or DEFAULT_EVERY)
    if given["on_cluster"]:
        _on_cluster(settings, choice, interval_s, given)
    elif given["every"]:
        _stay(settings, choice, interval_s, given)
    else:
        from raywb.fleet.choice import make_outlets

        outcome = run_once(settings, make_outlets(choice, interval_s), process_environment())
        _show(outcome, given)
        if not outcome.complete:
            sys.exit(EXIT_PARTIAL)


def _settings(given: dict[str, Any]) -> FleetSettings:
    from raywb.fleet.collector import FleetSettings
    from raywb.fleet.details import DetailRules
    from raywb.fleet.metrics import FleetRules

    return FleetSettings(
        window_hours=given["window_hours"],
        rules=FleetRules(given["push_to_main"], given["assumed_gpus"]),
        details=DetailRules() if given["verbose"] else None,
        secret_name=given["secret_name"],
        limit_s=given["limit_s"],
    )


def _choice(given: dict[str, Any]) -> OutletChoice:
    from raywb.fleet.choice import OutletChoice, parse_address

    return OutletChoice(
        datadog=given["push"],
        tags=given["tags"],
        serve=parse_address(given["serve"]) if given["serve"] else None,
        openmetrics=given["openmetrics"],
        ray_metrics=given["on_cluster"],
    )


def _stay(
    settings: FleetSettings, choice: OutletChoice, interval_s: float, given: dict[str, Any]
) -> None:
    """Collect until Ctrl-C or SIGTERM; errors that would come again end it at once."""
    from raywb.fleet.choice import make_outlets
    from raywb.fleet.cycle import repeat, run_once
    from raywb.settings import process_environment

    outlets = make_outlets(choice, interval_s)
    for outlet in outlets:
        click.echo(f"raywb: goes to {outlet.name}", err=True)
    ended = threading.Event()
    collected = False

    def tell(told: Outcome | RaywbError) -> None:
        nonlocal collected
        if isinstance(told, RaywbError):
            if isinstance(told, _LASTING) and not collected:
                raise told
            _complain(told, verbose=bool(given["verbose"]))
        else:
            collected = True
            _show(told, given)

    with _ending_on_signals(ended):
        repeat(
            interval_s,
            lambda: run_once(settings, outlets, process_environment()),
            tell=tell,
            ended=ended,
        )


class _Ended(BaseException):
    """Raised in the middle of whatever goes on when the process is to end."""


@contextlib.contextmanager
def _ending_on_signals(ended: threading.Event) -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM end the loop in good order, also during a collection."""

    def end(*_: object) -> None:
        ended.set()
        raise _Ended

    before = {one: signal.signal(one, end) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Ended:
        pass
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _on_cluster(
    settings: FleetSettings, choice: OutletChoice, interval_s: float, given: dict[str, Any]
) -> None:
    from raywb.cli import _connect
    from raywb.settings import process_environment

    _connect()
    from raywb.fleet.on_cluster import start_on_cluster, stop_on_cluster

    if given["stop"]:
        there = stop_on_cluster()
        click.echo("raywb: the collector has ended" if there else "raywb: there is no collector")
        return
    outcome = start_on_cluster(settings, choice, interval_s, process_environment())
    _show(outcome, given)
    pause = f"{interval_s / 60:g} minutes"
    click.echo(f"raywb: collects on the cluster every {pause} from now on", err=True)
    if not outcome.complete:
        sys.exit(EXIT_PARTIAL)


def _show(outcome: Outcome, given: dict[str, Any]) -> None:
    """Print a report, and what went wrong behind it."""
    import msgspec
    from rich.console import Console

    from raywb.fleet.terminal import render_report

    if given["as_json"]:
        click.echo(msgspec.json.encode(outcome.report.as_json()).decode())
    else:
        Console(markup=False, emoji=False).print(render_report(outcome.report))
    for name, text in outcome.failures.items():
        click.echo(f"raywb: {name} did not take the metrics: {text}", err=True)
    for text in outcome.report.incomplete:
        click.echo(f"raywb: not all runs could be read: missing are {text}", err=True)
    asked = ("push", "openmetrics", "serve", "on_cluster")
    if not given["as_json"] and not any(given[name] for name in asked):
        click.echo("raywb: a dry run, nothing was sent; --push sends it to Datadog", err=True)


def _complain(error: RaywbError, *, verbose: bool) -> None:
    """One sentence; with ``--verbose`` also where it happened, if the error knows."""
    click.echo(f"raywb: {error}", err=True)
    if verbose:
        for note in getattr(error, "__notes__", ()):
            click.echo(note, err=True)
