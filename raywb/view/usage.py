"""How busy the nodes are, as a person reads it in a terminal: a bar for each value, or the sums."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping

from rich.text import Text

from raywb.live import NodeUsage
from raywb.reports import Status
from raywb.view.drawing import (
    BAD,
    DIM,
    ODD,
    Column,
    Pen,
    bar,
    columns,
    count,
    counted,
    cut,
    duration,
    joined,
    plain,
)

__all__ = ["usage_lines"]

#: What is shown, the keys below ``nodes/<name>/``; and which columns go first where there is no
#: room: disk, then the GPUs' memory.
_SHOWN = (
    ("CPU", "cpu_percent", None),
    ("memory", "memory_percent", None),
    ("GPU", "gpu_percent", None),
    ("GPU memory", "gpu_memory_percent", 2),
    ("disk", "disk_percent", 1),
)

#: From these on a value is a warning, and trouble: full memory or a full disk ends work.
_FULL = {"memory_percent": (90.0, 97.0), "disk_percent": (90.0, 97.0)}

#: A GPU below it does nothing, though somebody pays for it.
_IDLE_GPU_PERCENT = 5.0

#: A reading that is older says how old it is, in seconds. Nodes are read every 15 s by default; a
#: status does not say how often.
OLD_S = 60.0


def usage_lines(status: Status, pen: Pen, limit: int) -> list[Text]:
    """The nodes, in at most ``limit`` lines; more of them than that are summed up."""
    live = status.live
    alive = [node for node in status.nodes if node.left_s is None]
    read = {one.name: one for one in live.nodes}
    if alive:
        there = {node.name for node in alive}
        read = {name: one for name, one in read.items() if name in there}
    if limit < 1 or not (alive or read or live.all_nodes):
        return []
    names = sorted({*(node.name for node in alive), *read})
    told = _told(status, names, read, pen)
    if limit == 1:
        return [joined([Text().append("nodes", "bold").append("  ").append_text(told)], pen)]
    head = next((node.name for node in alive if node.is_head), None)
    if read and len(names) <= limit - 1:
        rows = [_row(name, read.get(name), name == head, pen) for name in names]
        title, lines = columns(_layout(one.values for one in read.values()), rows, pen)
        told.pad_left(2)
        return [title, *lines, cut(told, pen)][:limit]
    sums = _sums(read, live.all_nodes)
    if not sums:
        return [joined([Text().append("nodes", "bold").append("  ").append_text(told)], pen)]
    old = bool(read) and all(one.stale or _is_old(one, pen) for one in read.values())
    rows = [_sum_row(kind, values, pen, old=old) for kind, values in sums.items()]
    room = limit - 2 - len(rows)
    worst = sorted(read.values(), key=_concern, reverse=True)[: max(room, 0)]
    rows += [_row(one.name, one, one.name == head, pen) for one in worst]
    # How many nodes these are sums of is said in the last line, where there is one.
    of = counted(len(names), "node") if limit == 2 and names else "nodes"
    layout = _layout([*sums.values(), *(one.values for one in worst)], of)
    title, lines = columns(layout, rows[: max(limit - 2, 1)], pen)
    told.pad_left(2)
    return [title, *lines, cut(told, pen)][:limit]


def _layout(values: Iterable[Mapping[str, float]], title: str = "nodes") -> list[Column]:
    """A column for each value that any node has."""
    known = {key for one in values for key in one}
    meters = [
        # Without a number there is no bar, and without a bar no column.
        Column(name, drawn=(13 if keep is None else 12, 24) if key in known else None, keep=keep)
        for name, key, keep in _SHOWN
    ]
    return [Column(Text(title, "bold"), shrinks_to=12), *meters, Column("", keep=3)]


def _is_old(one: NodeUsage, pen: Pen) -> bool:
    """No later reading has come for long: of this node, and as it may be of no other."""
    return pen.ago_s(one.time_s) > OLD_S


def _row(
    name: str, usage: NodeUsage | None, is_head: bool, pen: Pen
) -> list[Text | functools.partial[Text]]:
    stale = usage is None or usage.stale or _is_old(usage, pen)
    note = Text("")
    if usage is None:
        note = Text("not read yet", DIM)
    elif usage.stale:
        note = Text(f"stale {duration(pen.ago_s(usage.time_s))}", ODD)
    elif stale:
        note = Text(f"{duration(pen.ago_s(usage.time_s))} old", ODD)
    values = {} if usage is None else usage.values
    label = f"{plain(name)} (head)" if is_head else plain(name)
    return [Text(label, DIM if stale else ""), *_meters(values, pen, stale=stale), note]


def _meters(
    values: Mapping[str, float], pen: Pen, *, stale: bool = False
) -> list[functools.partial[Text]]:
    return [
        functools.partial(_meter, key, values.get(key), pen=pen, stale=stale)
        for _, key, _ in _SHOWN
    ]


def _meter(key: str, percent: float | None, width: int, *, pen: Pen, stale: bool) -> Text:
    """A bar with its percentage."""
    if percent is None or percent != percent:
        return Text("")
    style = "cyan"
    warning, trouble = _FULL.get(key, (101.0, 101.0))
    if percent >= warning:
        style = BAD if percent >= trouble else ODD
    elif key == "gpu_percent" and percent < _IDLE_GPU_PERCENT:
        style = ODD
    text = f"{percent:3.0f} %"
    line = bar(percent / 100, max(width - len(text) - 1, 4), pen, DIM if stale else style)
    return line.append(" ").append(text, DIM if stale else "" if style == "cyan" else style)


def _sums(
    read: Mapping[str, NodeUsage], all_nodes: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """The mean, the greatest and the least of each value over the nodes that answered."""
    sums: dict[str, dict[str, float]] = {}
    by_name: dict[str, Callable[[list[float]], float]] = {
        "mean": statistics.fmean,
        "max": max,
        "min": min,
    }
    for kind, combine in by_name.items():
        for _, key, _ in _SHOWN:
            values = [
                one.values[key] for one in read.values() if not one.stale and key in one.values
            ]
            if values:
                sums.setdefault(kind, {})[key] = combine(values)
            elif f"{kind}/{key}" in all_nodes:
                sums.setdefault(kind, {})[key] = all_nodes[f"{kind}/{key}"]
    return sums


def _sum_row(
    kind: str, values: Mapping[str, float], pen: Pen, *, old: bool
) -> list[Text | functools.partial[Text]]:
    title = {"mean": "mean", "max": "highest", "min": "lowest"}[kind]
    return [Text(title, DIM if old else ""), *_meters(values, pen, stale=old), Text("")]


def _concern(one: NodeUsage) -> tuple[bool, float, float]:
    """Nodes that are worth a look come first: those that do not answer, then the fullest."""
    full = max((one.values.get(key, 0.0) for key in _FULL), default=0.0)
    return one.stale, full, one.values.get("cpu_percent", 0.0)


def _told(status: Status, names: list[str], read: dict[str, NodeUsage], pen: Pen) -> Text:
    """How many nodes there are, and how many say nothing."""
    all_nodes = status.live.all_nodes
    alive = len(names) or int(all_nodes.get("alive", 0))
    stale = sum(one.stale for one in read.values())
    if not read and "answered" in all_nodes:
        stale = max(int(all_nodes.get("alive", 0) - all_nodes["answered"]), 0)
    idle = all_nodes.get("gpu_idle_share")
    gpus = sum(sum(node.gpus.values()) for node in status.nodes if node.left_s is None)
    left = sum(node.left_s is not None for node in status.nodes)
    ago_s = pen.ago_s(max((one.time_s for one in read.values()), default=pen.now_s))
    told: list[Text | str | None] = [
        counted(alive, "node"),
        Text(f"last read {duration(ago_s)} ago", ODD) if ago_s > OLD_S else None,
        counted(gpus, "GPU") if gpus else None,
        Text(f"{idle:.0%} of the GPUs idle", ODD if idle >= 0.5 else "") if idle else None,
        Text(f"{count(stale)} did not answer", ODD) if stale else None,
        None if read or all_nodes else Text("utilization is not read", DIM),
        Text(f"{count(left)} left", DIM) if left else None,
    ]
    return joined(told, pen)
