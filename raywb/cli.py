"""The ``raywb`` command: look at the service of a Ray cluster, and end its run."""

from __future__ import annotations

import sys
from typing import Any

import click

from raywb import __version__
from raywb.errors import NoClusterError, RaywbError, ServiceUnavailable

__all__ = ["main"]

#: Exit codes, so that scripts can tell one trouble from another.
EXIT_NO_CLUSTER = 3
EXIT_NO_SERVICE = 4
EXIT_UNDELIVERED = 5


class _Errors(click.Group):
    """Shows raywb's errors as one sentence, with an exit code of their own."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RaywbError as error:
            click.echo(f"raywb: {error}", err=True)
            codes = {NoClusterError: EXIT_NO_CLUSTER, ServiceUnavailable: EXIT_NO_SERVICE}
            sys.exit(next((code for kind, code in codes.items() if isinstance(error, kind)), 1))


@click.group(cls=_Errors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raywb")
@click.option(
    "--address",
    metavar="ADDRESS",
    help="Ray cluster, as for ray.init(); by default RAY_ADDRESS, else the one on this machine.",
)
def main(address: str | None) -> None:
    """One W&B run for a whole Ray cluster.

    Exit codes: 0 all is well, 1 an error, 2 wrong usage, 3 no Ray cluster, 4 no service on it or
    no answer, 5 rows are not with W&B.
    """
    click.get_current_context().obj = address or "auto"


def _connect() -> None:
    """Connect without the lines that Ray says about itself."""
    import ray

    address = click.get_current_context().obj
    try:
        ray.init(address=address, logging_level="warning", log_to_driver=False)
    except ConnectionError as error:
        where = "on this machine" if address == "auto" else f"at {address!r}"
        raise NoClusterError(
            f"there is no Ray cluster {where}: `ray start --head` starts one, and --address or "
            "RAY_ADDRESS names one elsewhere"
        ) from error


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(as_json: bool) -> None:
    """Show the run, its delivery and who logs to it."""
    import msgspec
    from rich.console import Console

    import raywb
    from raywb.view.terminal import render_status

    _connect()
    answer = raywb.status()
    if as_json:
        click.echo(msgspec.json.encode(answer).decode())
    else:
        Console().print(render_status(answer))


@main.command()
@click.option("--timeout-s", default=300.0, show_default=True, help="Longest that it may take.")
@click.option("--exit-code", default=0, show_default=True, help="Not 0: the run failed.")
@click.option("--stop", is_flag=True, help="End the service's actor, too.")
def finish(timeout_s: float, exit_code: int, stop: bool) -> None:
    """End the cluster's run: take in what is still in journals, deliver it, close the run."""
    from rich.console import Console

    import raywb
    from raywb.lifecycle import stop_service
    from raywb.view.terminal import render_report

    _connect()
    report = raywb.finish(timeout_s=timeout_s, exit_code=exit_code)
    Console().print(render_report(report))
    if stop and report.complete:
        stop_service()
    if not report.complete:
        sys.exit(EXIT_UNDELIVERED)


if __name__ == "__main__":
    main()
