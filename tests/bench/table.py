"""The table that a benchmark prints."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from typing import NamedTuple

import rich
from rich.table import Table


class Line(NamedTuple):
    """One figure.

    Attributes:
        what: what was measured.
        ours: raywb's figure.
        against: the peer's figure in the same run, and the target.
        conditions: how it was measured.
        met: whether the target was met; None for a figure that has none.
    """

    what: str
    ours: str
    against: str
    conditions: str
    met: bool | None = None


def machine() -> str:
    """The machine and its present load, as the table's caption says it."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("msgspec", "ray", "wandb"))
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return (
        f"{os.cpu_count()} cores, {_processor()}; Linux {platform.release()}, Python "
        f"{platform.python_version()}, {versions}; load average {load} "
        f"at {datetime.datetime.now():%Y-%m-%d %H:%M}"
    )


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def show(lines: list[Line], *, before: str) -> None:
    """Print the table; ``before`` is what :func:`machine` said when the benchmarks began."""
    table = Table(
        title="raywb, and what else one could use",
        caption=f"before: {before}\nafter: {machine()}",
        caption_justify="left",
        show_lines=True,
    )
    for column in ("what", "raywb", "peer or target", "conditions", "met"):
        table.add_column(column, overflow="fold")
    for line in lines:
        met = {True: "met", False: "MISSED", None: ""}[line.met]
        table.add_row(line.what, line.ours, line.against, line.conditions, met)
    width = None if rich.get_console().is_terminal else 150
    rich.console.Console(width=width).print(table)
