"""Stages with ranks as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raywb.reports import StageStatus
from raywb.view.drawing import plain

__all__ = ["render_stages"]

#: Stages that are listed one by one: those with slow ranks first.
LISTED_STAGES = 20


def render_stages(stages: Sequence[StageStatus]) -> RenderableType:
    """How far each stage is, and which of its ranks are not; what that means is in the warnings."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("stage with ranks", overflow="fold")
    for name in ("ranks", "step", "last row"):
        table.add_column(name, justify="right")
    table.add_column("slow or silent", overflow="fold")
    for one in sorted(stages, key=lambda stage: stage.warning is None)[:LISTED_STAGES]:
        ranks = f"{one.attached} of {one.world_size}"
        if one.ended:
            ranks += f", {one.ended} ended"
        step = "-" if one.step is None else f"{one.step:g}"
        last = "-" if one.last_row_s is None else f"{one.last_row_s:.0f} s ago"
        slow = ", ".join(str(rank.rank) for rank in one.slow)
        if one.slow_ranks > len(one.slow):
            slow += f" and {one.slow_ranks - len(one.slow)} more"
        table.add_row(Text(plain(one.stage)), ranks, step, last, slow or "none")
    more = len(stages) - LISTED_STAGES
    return Group(table, Text(f"and {more} more")) if more > 0 else table
