"""``raywb vast``: machines of Vast.ai that run a recipe, report, and end themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raywb.errors import (
    InstanceUnknown,
    NoOffer,
    NotDestroyed,
    RaywbError,
    SourceNotPinned,
    VastKeyRefused,
    VastUnavailable,
)
from raywb.launch.vast.offers import DEFAULT_IMAGE
from raywb.settings import process_environment

if TYPE_CHECKING:
    from raywb.launch.vast.instances import Instance

__all__ = ["EXIT_CODES", "vast"]

#: Exit codes, so that scripts can tell one trouble from another.
EXIT_SOURCE = 30
EXIT_KEY = 31
EXIT_NO_OFFER = 32
EXIT_SERVICE = 33
EXIT_NO_INSTANCE = 34
EXIT_NOT_DESTROYED = 35

#: What ``raywb`` exits with for each trouble.
EXIT_CODES: dict[type[RaywbError], int] = {
    SourceNotPinned: EXIT_SOURCE,
    VastKeyRefused: EXIT_KEY,
    NoOffer: EXIT_NO_OFFER,
    VastUnavailable: EXIT_SERVICE,
    InstanceUnknown: EXIT_NO_INSTANCE,
    NotDestroyed: EXIT_NOT_DESTROYED,
}


@click.group()
@click.option(
    "--api-key-file",
    metavar="FILE",
    help="Holds Vast.ai's key; else VAST_API_KEY, else where Vast.ai's client keeps it.",
)
def vast(api_key_file: str | None) -> None:
    """Machines of Vast.ai: launch a recipe on one, look at it, destroy it.

    Exit codes: 0 done, 1 an error, 2 wrong usage, 30 what is to run is not one commit that the
    remote has, 31 no key, or Vast.ai does not accept it, 32 no machine is to be had, 33 Vast.ai
    cannot be asked, 34 there is no such instance, 35 an instance was not destroyed.
    """
    click.get_current_context().obj = api_key_file


@vast.command()
@click.argument("recipe")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--gpu", "gpus", multiple=True, default=("RTX 4090",), show_default=True, metavar="NAME",
    help="Any of these.",
)  # fmt: skip
@click.option("--gpu-count", default=1, show_default=True, type=click.IntRange(1))
@click.option(
    "--max-price", default=1.0, show_default=True, help="Most dollars an hour, disk included."
)
@click.option("--disk-gb", default=60.0, show_default=True, type=click.FloatRange(8.0))
@click.option(
    "--image", default=DEFAULT_IMAGE, show_default=True, help="With Python 3.11 or later."
)
@click.option(
    "--region", "regions", multiple=True, metavar="CC", help="Country, as in SE; any of these."
)
@click.option(
    "--reliability", default=0.98, show_default=True, type=click.FloatRange(0, 1),
    help="Least share of time that the machine was there.",
)  # fmt: skip
@click.option("--offer", "number", type=int, help="Take this offer and no other.")
@click.option(
    "--auto-shutdown/--no-auto-shutdown", default=False, show_default=True,
    help="Destroy the instance when all is delivered.",
)  # fmt: skip
@click.option(
    "--grace-s", default=10.0, show_default=True, type=click.FloatRange(0),
    help="Wait so long before that.",
)  # fmt: skip
@click.option("--keep-on-failure", is_flag=True, help="Not when the recipe failed.")
@click.option(
    "--even-if-undelivered", is_flag=True, help="Also when data are on the instance alone."
)
@click.option(
    "--outputs",
    metavar="DIR",
    help="Results that are not to be lost; by default what output_dir= says, or data.",
)
@click.option("--upload-to", metavar="URL", help="Where the outputs go, as in s3://bucket/name.")
@click.option(
    "--upload-is-elsewhere", is_flag=True,
    help="A path in --upload-to is a remote file system that is mounted on the instance.",
)  # fmt: skip
@click.option(
    "--attempts", default=5, show_default=True, type=click.IntRange(1),
    help="How often the recipe is begun when the instance restarts under it.",
)  # fmt: skip
@click.option(
    "--max-hours", default=0.0, type=click.FloatRange(0), metavar="H",
    help="End the recipe, as failed, so long after it was first begun; by default never.",
)  # fmt: skip
@click.option("--repo", metavar="URL", help="Fetch from here; by default from origin.")
@click.option("--commit", metavar="NAME", help="Run this one; by default what is checked out.")
@click.option("--extras", default="train,vast", show_default=True, help="Of the project, for pip.")
@click.option(
    "--env", "env", multiple=True, metavar="NAME[=VALUE]",
    help="Set this on the instance; without a value, as it is here.",
)  # fmt: skip
@click.option("--wandb-key-file", metavar="FILE", help="Holds W&B's key for the instance.")
@click.option("--git-token-file", metavar="FILE", help="Holds what reads a private repository.")
@click.option("--label", help="What the instance is called; by default raywb and the recipe.")
@click.option("--yes", "-y", is_flag=True, help="Rent without asking.")
@click.option("--dry-run", is_flag=True, help="Rent nothing; print the script and the price.")
def launch(**options: Any) -> None:
    """Rent a machine that runs RECIPE, as in `raywb vast launch recipes.pretrain -- tiny`.

    RECIPE is a module, as for `python -m`, or a file; what stands behind -- is for it. What runs
    is one commit, which the remote has to have. The number of the instance goes to standard
    output, and so does the script of a dry run; all else goes to standard error.
    """
    from raywb.launch.vast.launching import Launch

    environment = process_environment()
    launching = Launch(environment, click.get_current_context().obj, **options)
    launching.run(Path.cwd())


@vast.command("list")
@click.option("--all", "everything", is_flag=True, help="Also what raywb did not launch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def list_command(everything: bool, as_json: bool) -> None:
    """Show the instances that raywb launched."""
    import msgspec
    from rich.console import Console

    from raywb.launch.vast.instances import list_instances

    found = [one for one in list_instances(_client()) if everything or one.launch is not None]
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    elif found:
        Console().print(_table(found))
    else:
        click.echo("no instances" if everything else "no instances that raywb launched")


@vast.command()
@click.argument("number", metavar="ID", type=int)
@click.option("--follow", "-f", is_flag=True, help="Go on until the instance has ended.")
@click.option("--tail", default=1000, show_default=True, type=click.IntRange(1), help="Last lines.")
@click.option(
    "--pause-s", default=5.0, show_default=True, type=click.FloatRange(0.1),
    help="With --follow: between two looks.",
)  # fmt: skip
def logs(number: int, follow: bool, tail: int, pause_s: float) -> None:
    """Show what instance ID printed."""
    from raywb.launch.vast.instances import follow_log, read_log

    client = _client()
    if not follow:
        click.echo(read_log(client, number, tail), nl=False)
        return
    for line in follow_log(client, number, tail, pause_s):
        click.echo(line, nl=False)


@vast.command()
@click.argument("number", metavar="ID", type=int)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--timeout-s", default=60.0, show_default=True, help="Wait so long for its end.")
def destroy(number: int, yes: bool, timeout_s: float) -> None:
    """Destroy instance ID with all that is on its disk, and see that it is gone."""
    from raywb.launch.vast.instances import destroy as destroy_instance
    from raywb.launch.vast.instances import show

    client = _client()
    instance = show(client, number)
    if instance is None:
        raise InstanceUnknown(f"Vast.ai knows no instance {number} of this account")
    if not yes:
        click.echo(f"{_in_words(instance)}\nAll that lies on its disk alone is lost.", err=True)
        click.confirm(f"Destroy instance {number}?", abort=True, err=True)
    destroy_instance(client, number, timeout_s=timeout_s)
    click.echo(f"instance {number} is gone")


def _client() -> Any:
    from raywb.launch.vast.client import connect

    return connect(click.get_current_context().obj, process_environment())


def _in_words(one: Instance) -> str:
    what = f", {one.recipe}" if one.recipe else ""
    return f"instance {one.id}: {one.state}, {one.gpu}, {one.price:.3f} $/h{what}"


def _table(instances: list[Instance]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("id", "state", "GPU", "$/h", "hours", "$", "label", "commit"):
        table.add_column(name, justify="right" if name in ("id", "$/h", "hours", "$") else "left")
    for one in instances:
        table.add_row(
            *(str(one.id), one.state, one.gpu, f"{one.price:.3f}", f"{one.hours:.1f}"),
            *(f"{one.hours * one.price:.2f}", one.label or "", (one.commit or "")[:12]),
        )
    return table
