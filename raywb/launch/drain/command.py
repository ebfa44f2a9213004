"""``raywb drain``: now, or when the end of this machine is announced."""

from __future__ import annotations

import sys

import click

from raywb.launch.drain.spot_notice import METADATA_URL
from raywb.launch.shutdown.outcomes import missing

__all__ = ["drain"]

#: What a drain leaves of the notice for whatever else has to end, in seconds.
MARGIN_S = 5.0


@click.command()
@click.option(
    "--watch", is_flag=True, help="Wait for SIGTERM, SIGUSR1, SIGHUP or EC2's spot notice first."
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=1),
    default=110.0,
    show_default=True,
    help="Longest that it may take; EC2's notice says itself when the end is.",
)
@click.option(
    "--exit-code",
    default=143,
    show_default=True,
    help="How the run ends where its head goes.",
)
@click.option(
    "--metadata-url",
    default=METADATA_URL,
    show_default=True,
    help="EC2's metadata service; empty: signals alone.",
)
@click.pass_obj
def drain(address: str, watch: bool, timeout_s: float, exit_code: int, metadata_url: str) -> None:
    """Bring off this machine, which is about to end, what raywb holds there.

    On any node: what its processes have logged goes to the service. On the head's: the run is
    finished in time, and W&B's server asked until it shows all of it; raywb.start(run_id=…) goes
    on with it later. It is made to run on every node of its own, beside the work.

    Exit codes: 0 everything is off this machine, 4 the cluster did not answer, 5 rows are left,
    8 a run is offline, 10 tables, artifacts or alerts are left.
    """
    from raywb.launch.drain.draining import drain as drain_machine
    from raywb.launch.drain.spot_notice import SpotNotice
    from raywb.launch.drain.watch import defer_signals, disregard_signals, wait_for_notice
    from raywb.lifecycle import say
    from raywb.settings import process_environment

    if watch:
        defer_signals()
        say("Waiting for the end of this machine to be announced")
        notice = wait_for_notice(SpotNotice(metadata_url) if metadata_url else None, say)
        if notice.in_s is not None:
            timeout_s = max(notice.in_s - MARGIN_S, 1.0)
        say(f"{notice.reason}: draining for at most {timeout_s:.0f} s")
    disregard_signals()
    left = drain_machine(
        address,
        process_environment(),
        say,
        timeout_s=timeout_s,
        exit_code=exit_code,
        on_connect=disregard_signals,
    )
    undelivered = missing(left)
    for _, sentences in undelivered:
        for sentence in sentences:
            say(f"! {sentence}")
    if not undelivered:
        say("✓ Everything is off this machine")
    sys.exit(undelivered[0][0] if undelivered else 0)
