"""``raywb doctor``: says what is wrong, and what to do about it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from raywb.doctor.findings import Diagnosis, Finding

__all__ = ["EXIT_TROUBLE", "doctor"]

#: Something that was found does not work.
EXIT_TROUBLE = 7

_MARKS = {"well": ("✓", "green"), "warning": ("!", "yellow"), "trouble": ("✗", "bold red")}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File on the head node that holds W&B's key, as given to raywb.start().",
)
@click.option(
    "--timeout-s", default=120.0, show_default=True, help="Longest that the cluster may take."
)
@click.pass_obj
def doctor(address: str, as_json: bool, api_key_file: Path | None, timeout_s: float) -> None:
    """Say what keeps metrics from W&B, and what to do about it.

    Looks at the Ray cluster, the environment of its processes, its nodes' CPUs, versions, imports,
    disks and clocks, at W&B's key and server, and at the service; without a cluster, at what can be
    seen from here. Changes nothing.
    """
    import msgspec

    from raywb.doctor.examination import examine
    from raywb.settings import process_environment

    diagnosis = examine(
        address,
        process_environment(),
        api_key_file=str(api_key_file) if api_key_file else None,
        limit_s=timeout_s,
    )
    if as_json:
        click.echo(msgspec.json.encode(diagnosis).decode())
    else:
        _print(diagnosis)
    if not diagnosis.is_well:
        sys.exit(EXIT_TROUBLE)


def _print(diagnosis: Diagnosis) -> None:
    """As a table on a terminal; elsewhere a line for each, so that it can be searched."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for finding in diagnosis.findings:
            click.echo("\n".join(_lines(finding)))
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in diagnosis.findings:
        mark, style = _MARKS[finding.state]
        table.add_row(Text(mark, style=style), finding.check, Text(finding.found))
        if finding.remedy:
            table.add_row("", "", Text(f"→ {finding.remedy}", style="dim"))
    console.print(table)


def _lines(finding: Finding) -> list[str]:
    lines = [f"{_MARKS[finding.state][0]} {finding.check}: {finding.found}"]
    return [*lines, *([f"    → {finding.remedy}"] if finding.remedy else [])]
