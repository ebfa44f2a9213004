"""The ``raywb`` command: look at a cluster's service, end its run, bring home what it left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raywb import __version__
from raywb.charts.command import charts
from raywb.doctor.command import doctor
from raywb.errors import DirectoryError, NoClusterError, RaywbError, ServiceUnavailable
from raywb.fleet.command import fleet
from raywb.launch.drain.command import drain
from raywb.launch.shutdown.command import shutdown
from raywb.launch.vast.command import EXIT_CODES as VAST_CODES
from raywb.launch.vast.command import vast
from raywb.view.grafana.command import grafana
from raywb.view.page.command import ui
from raywb.view.report.command import report

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

#: Exit codes, so that scripts can tell one trouble from another.
EXIT_NO_CLUSTER = 3
EXIT_NO_SERVICE = 4
EXIT_UNDELIVERED = 5
EXIT_DIRECTORY = 6


_CODES: dict[type[RaywbError], int] = {
    NoClusterError: EXIT_NO_CLUSTER,
    ServiceUnavailable: EXIT_NO_SERVICE,
    DirectoryError: EXIT_DIRECTORY,
    **VAST_CODES,
}


class _Errors(click.Group):
    """Shows raywb's errors as one sentence, with an exit code of their own."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RaywbError as error:
            click.echo(f"raywb: {error}", err=True)
            sys.exit(next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1))


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
    no answer, 5 rows are not with W&B, 6 a directory is no service's or is in use, 7 `raywb doctor`
    found trouble; `raywb shutdown` has more of them.
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
    except (ValueError, RuntimeError, ray.exceptions.RayError) as error:
        # An address that is none, another version of Ray or Python, a token that is not accepted.
        where = "on this machine" if address == "auto" else f"at {address!r}"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NoClusterError(f"cannot connect to a Ray cluster {where}: {reason}") from error


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
@click.option(
    "--interval-s",
    type=click.FloatRange(min=0.2),
    default=2.0,
    show_default=True,
    help="How often the service is asked.",
)
@click.option("--feed", is_flag=True, hidden=True, help="Write statuses for another process.")
def watch(interval_s: float, feed: bool) -> None:
    """Show pipelines, stages, nodes and delivery as they go on, until q or Ctrl-C."""
    from raywb.view.watch import watch_command

    watch_command(click.get_current_context().obj, _connect, interval_s, feed=feed)


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


_directory = click.argument("directory", type=click.Path(path_type=Path))
_timeout = click.option(
    "--timeout-s", default=600.0, show_default=True, help="Longest that W&B is waited for."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@main.command()
@_directory
@click.option(
    "--exit-code",
    type=int,
    help="How a run ended that nobody finished: 0 well, else failed. By default it is left as "
    "crashed.",
)
@click.option(
    "--journals",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Look for journals in this directory, too, for instance in copies from other nodes.",
)
@_timeout
@_json
def recover(
    directory: Path,
    exit_code: int | None,
    journals: tuple[Path, ...],
    timeout_s: float,
    as_json: bool,
) -> None:
    """Bring home what a cluster left that is gone, and end its runs.

    DIRECTORY is the service's: what start() printed as dir. No Ray is needed.
    """
    from raywb.service.recover import recover as recover_directory
    from raywb.view.progress import show_progress
    from raywb.view.terminal import render_recovery

    with show_progress(_stderr()) as tell:
        report = recover_directory(
            directory.absolute(),
            exit_code=exit_code,
            journals=journals,
            timeout_s=timeout_s,
            tell=tell,
        )
    _answer(report, render_recovery(report), as_json=as_json)
    if not report.complete:
        sys.exit(EXIT_UNDELIVERED)


@main.command()
@_directory
@click.option("--project", help="W&B project, if not the run's own.")
@click.option("--entity", help="W&B team or user, if not the run's own.")
@click.option("--base-url", help="W&B's server, if not the run's own.")
@_timeout
@_json
def sync(
    directory: Path,
    project: str | None,
    entity: str | None,
    base_url: str | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Send to W&B's server what an offline run, or a finish() that was cut short, left.

    DIRECTORY is the service's: what start() printed as dir. What the server has is not sent
    again. No Ray is needed, but a key is.
    """
    from raywb.service.sync import sync as sync_directory
    from raywb.view.progress import show_progress
    from raywb.view.terminal import render_sync

    with show_progress(_stderr()) as tell:
        report = sync_directory(
            directory.absolute(),
            project=project,
            entity=entity,
            base_url=base_url,
            timeout_s=timeout_s,
            tell=tell,
        )
    _answer(report, render_sync(report), as_json=as_json)
    if not report.complete:
        sys.exit(EXIT_UNDELIVERED)


def _stderr() -> Console:
    """Where progress goes, so that what a command prints can be piped on."""
    from rich.console import Console

    return Console(stderr=True)


def _answer(report: Any, rendered: Any, *, as_json: bool) -> None:
    import msgspec
    from rich.console import Console

    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        Console().print(rendered)


for _command in (charts, doctor, drain, fleet, grafana, report, shutdown, ui, vast):
    main.add_command(_command)


if __name__ == "__main__":
    main()
