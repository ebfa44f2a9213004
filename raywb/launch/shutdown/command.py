"""``raywb shutdown``: delivers everything, and ends where the work ran."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raywb.launch.places.choice import PLACES
from raywb.launch.shutdown.outcomes import EXIT_CODES

if TYPE_CHECKING:
    from raywb.launch.places import Place

__all__ = ["shutdown"]

_HELP = """Deliver everything, wait the grace time, and end where the work ran.

Everything: the cluster's run is finished, and W&B's server asked until it shows all of it; what
clusters that are gone left in ~/raywb or RAYWB_DIR is brought home; --outputs are uploaded. Where
something of it cannot be had the place stays, since ending it is irreversible. So it does when
this command is ended before it has asked for the end.

Exit codes:

\b
{codes}
"""


def _help() -> str:
    codes = "\n".join(f"{code:5d}  {text}" for code, text in EXIT_CODES.items())
    return _HELP.format(codes=codes)


@click.command(help=_help(), short_help="Deliver everything, and end where the work ran.")
@click.option(
    "--grace-s",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Wait so long before the end.",
)
@click.option(
    "--place",
    type=click.Choice(PLACES),
    default="auto",
    show_default=True,
    help="What is to end; auto takes the first of them that this is, in this order, and a "
    "--command before all.",
)
@click.option("--command", metavar="CMD", help="Ends the place: a line for /bin/sh.")
@click.option(
    "--even-if-undelivered", is_flag=True, help="End it whatever is undelivered, and lose that."
)
@click.option(
    "--job-exit-code",
    type=int,
    default=None,
    metavar="N",
    help="How the work ended; not 0: the run is finished as failed.",
)
@click.option("--keep-on-failure", is_flag=True, help="A failed job's place stays, delivered.")
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    help="Longest that the delivery may take, and again the upload.",
)
@click.option(
    "--confirm-s",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Longest that the end is waited for.",
)
@click.option(
    "--outputs",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Directory of results that are not to be lost: undelivered without --upload-to.",
)
@click.option(
    "--upload-to", metavar="URL", help="Where the outputs go, for instance s3://bucket/name."
)
@click.option(
    "--upload-is-elsewhere",
    is_flag=True,
    help="A path in --upload-to is another machine's file system, mounted here.",
)
@click.option(
    "--outputs-if-any", is_flag=True, help="A job that ended well may have made no --outputs."
)
@click.pass_obj
def shutdown(address: str, /, **options: Any) -> None:
    from raywb.launch.aside import leave
    from raywb.launch.places import EndFailed
    from raywb.launch.places.choice import choose_place
    from raywb.launch.shutdown.outcomes import no_place, refused
    from raywb.lifecycle import say
    from raywb.settings import process_environment

    if options["upload_to"] is not None and options["outputs"] is None:
        raise click.UsageError("--upload-to says where --outputs go: give both")
    environment = process_environment()
    try:
        place = choose_place(options["place"], options["command"], environment)
    except EndFailed as error:
        decision = refused("the instance", str(error))
    else:
        if not isinstance(place, str):
            leave(_run(place, address, environment, options))
        decision = no_place(place)
    for line in decision.lines:
        say(line)
    sys.exit(decision.exit_code)


def _run(
    place: Place, address: str, environment: Mapping[str, str], options: Mapping[str, Any]
) -> int:
    from raywb.launch.aside import aside
    from raywb.launch.delivered import deliver
    from raywb.launch.outputs import upload_outputs
    from raywb.launch.shutdown.ending import run_shutdown
    from raywb.launch.shutdown.outcomes import Asked
    from raywb.launch.shutdown.signals import Signals
    from raywb.lifecycle import say

    signals = Signals()
    job_exit_code = options["job_exit_code"]
    asked = Asked(
        options["grace_s"],
        options["confirm_s"],
        job_exit_code or 0,
        options["keep_on_failure"],
        options["even_if_undelivered"],
    )
    return run_shutdown(
        place,
        asked,
        signals,
        deliver=lambda: deliver(
            address,
            environment,
            say,
            timeout_s=options["timeout_s"],
            exit_code=job_exit_code,
            disk_stays=place.keeps_disk,
            though_others_log=options["even_if_undelivered"],
            aside=aside,
        ),
        upload=lambda: upload_outputs(
            options["outputs"],
            options["upload_to"],
            timeout_s=options["timeout_s"],
            local_is_elsewhere=place.keeps_disk or options["upload_is_elsewhere"],
            may_be_missing=bool(job_exit_code) or options["outputs_if_any"],
        ),
        say=say,
    )
