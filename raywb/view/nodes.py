"""The cluster's nodes as a person reads them in a terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raywb.reports import NodeStatus
from raywb.view.drawing import plain

__all__ = ["render_nodes"]

#: Nodes that are listed one by one; more of them are summed up by what they are.
LISTED_NODES = 10

#: Of those that have left, the latest are named.
LISTED_LEFT = 3


def render_nodes(nodes: Sequence[NodeStatus]) -> RenderableType:
    """Each node and what it is; beyond ten of them, how many there are of each kind."""
    alive = [node for node in nodes if node.left_s is None]
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    if len(alive) <= LISTED_NODES:
        table.add_column("node", overflow="fold")
    else:
        table.add_column("nodes", justify="right")
    for name in ("kind", "CPUs", "memory", "GPUs", "versions"):
        table.add_column(name, overflow="fold")
    if len(alive) <= LISTED_NODES:
        for node in alive:
            name = f"{node.name} (head)" if node.is_head else node.name
            table.add_row(*map(Text, map(plain, (name, *_what(node)))))
    else:
        kinds = Counter(_what(node) for node in alive)
        for what, count in kinds.most_common(LISTED_NODES):
            table.add_row(*map(Text, map(plain, (str(count), *what))))
        if (others := len(alive) - sum(n for _, n in kinds.most_common(LISTED_NODES))) > 0:
            table.add_row(str(others), "of other kinds", "", "", "", "")
    parts: list[RenderableType] = [table]
    if left := [node for node in nodes if node.left_s is not None]:
        parts.append(Text(plain(_left(left)), style="dim"))
    return Group(*parts)


def _what(node: NodeStatus) -> tuple[str, ...]:
    cloud, versions = node.facts.get("cloud", {}), node.facts.get("versions", {})
    kind = cloud.get("instance_type") or cloud.get("node_type") or cloud.get("provider") or "-"
    if cloud.get("market_type"):
        kind += f" ({cloud['market_type']})"
    gpus = ", ".join(f"{count} x {name}" for name, count in sorted(node.gpus.items())) or "-"
    known = [f"{name} {versions[name]}" for name in ("python", "ray", "torch") if name in versions]
    if not node.probed:
        known = ["not probed" if node.error else "not probed yet"]
    return kind, f"{node.cpu_count:g}", f"{node.memory_gb:.0f} GB", gpus, ", ".join(known)


def _left(left: list[NodeStatus]) -> str:
    latest = sorted(left, key=lambda node: -(node.left_s or 0.0))[:LISTED_LEFT]
    times = [time.strftime("%H:%M:%S", time.localtime(node.left_s)) for node in latest]
    named = ", ".join(f"{one.name} at {at}" for one, at in zip(latest, times, strict=True))
    more = f" and {len(left) - len(latest)} before" if len(left) > len(latest) else ""
    return f"{len(left)} left: {named}{more}"
