"""Pipelines as a person reads them in a terminal: a bar for each stage, the bottleneck marked."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

from rich.text import Text

from raywb.live import Live, PipelineProgress, PipelineStageProgress
from raywb.view.drawing import (
    BAD,
    DIM,
    GOOD,
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
    short,
)

__all__ = ["pipeline_lines"]

#: A pipeline that runs, and has said nothing for this long, is marked, in seconds.
QUIET_S = 180.0

#: Width of the bar of a whole pipeline.
BAR_CELLS = 8

_STATE_STYLES = {"running": "cyan", "done": GOOD, "failed": BAD}


def pipeline_lines(live: Live, pen: Pen, limit: int) -> list[Text]:
    """The pipelines, in at most ``limit`` lines; those that run come with their stages."""
    if not live.pipelines or limit < 2:
        return [] if not live.pipelines else [_summary(live, pen)][:limit]
    running = [one for one in live.pipelines if one.state == "running"]
    ended = [one for one in live.pipelines if one.state != "running"]
    ordered = [*running, *ended]
    heads = ordered[: limit - 1]
    hidden = len(ordered) - len(heads) + live.more_pipelines
    if hidden and len(heads) > 1 and len(heads) == limit - 1:
        heads, hidden = heads[:-1], hidden + 1
    room = limit - 1 - len(heads) - bool(hidden)
    chosen: list[list[PipelineStageProgress]] = []
    for one in heads:
        # The last that ended is of interest too, when there is room.
        wanted = one.state == "running" or (not running and one is heads[0])
        stages = _chosen(one.stages, room) if wanted else []
        room -= len(stages)
        chosen.append(stages)
    flat = [stage for stages in chosen for stage in stages]
    title, drawn = columns(_layout(pen), [_stage_cells(stage, pen) for stage in flat], pen)
    rows = iter(drawn)
    lines = [title if flat else Text("pipelines", "bold")]
    for one, stages in zip(heads, chosen, strict=True):
        lines.append(_head(one, len(one.stages) - len(stages) if stages else 0, pen))
        lines += [next(rows) for _ in stages]
    if hidden:
        states = Counter(one.state for one in ordered[len(heads) :])
        known = ", ".join(f"{many} {state}" for state, many in states.items())
        more = f"and {count(hidden)} more" + (f": {known}" if known else "")
        lines.append(cut(Text(more, DIM), pen))
    return lines[:limit]


def _summary(live: Live, pen: Pen) -> Text:
    states = Counter(one.state for one in live.pipelines)
    known = ", ".join(f"{many} {state}" for state, many in states.items())
    return cut(Text().append("pipelines  ", "bold").append(known, ""), pen)


def _chosen(stages: Sequence[PipelineStageProgress], room: int) -> list[PipelineStageProgress]:
    """As many as there is room for: the bottleneck, those at work, the others; in their order."""
    if len(stages) <= room:
        return list(stages)

    def rank(index: int) -> tuple[bool, bool, int]:
        stage = stages[index]
        return not stage.is_bottleneck, not stage.slots_used, index

    kept = sorted(sorted(range(len(stages)), key=rank)[: max(room, 0)])
    return [stages[index] for index in kept]


def _head(one: PipelineProgress, left_out: int, pen: Pen) -> Text:
    """How far the whole pipeline is."""
    name = Text().append(plain(one.name) or "xenna", "bold")
    state = Text(one.state, _STATE_STYLES.get(one.state, ""))
    if one.state == "running":
        state = bar(one.percent / 100, BAR_CELLS, pen).append(f" {one.percent:.0f} %", "cyan")
    rates = {
        "in": f"{counted(one.inputs_left, 'input')} left",
        "out": counted(one.outputs, "output"),
    }
    if one.state == "running" and one.inputs_per_s is not None:
        rates["in"] += f" ({short(one.inputs_per_s)}/s)"
    if one.outputs_per_s is not None:
        rates["out"] += f" ({short(one.outputs_per_s)}/s)"
    quiet = one.state == "running" and pen.ago_s(one.time_s) > QUIET_S
    more = f"{left_out} more stages" if left_out else None
    told: list[Text | str | None] = [
        name.append("  ").append_text(state),
        Text(plain(one.error), BAD) if one.error else None,
        duration(one.duration_s),
        Text(f"silent for {duration(pen.ago_s(one.time_s))}", ODD) if quiet else None,
        rates["in"] if one.inputs_left or one.state == "running" else None,
        rates["out"],
        Text(more, DIM) if more else None,
    ]
    return joined(told, pen)


def _layout(pen: Pen) -> list[Column]:
    return [
        Column(Text("pipelines", "bold"), shrinks_to=14),
        Column("", drawn=(6, 40)),
        Column("tasks done", right=True),
        Column("queue", right=True, keep=3),
        Column(f"actors {pen.sign('×', 'x')} tasks/s", right=True, keep=2),
        Column("CPU", right=True, keep=0),
        Column("memory", right=True, keep=1),
        Column("", keep=4),
    ]


def _stage_cells(stage: PipelineStageProgress, pen: Pen) -> list[Text | functools.partial[Text]]:
    share = stage.tasks_completed / stage.tasks_known if stage.tasks_known else 0.0
    done = stage.tasks_known > 0 and stage.tasks_completed >= stage.tasks_known
    style = ODD if stage.is_bottleneck else GOOD if done else "cyan"
    mark = pen.sign("▸", ">") if stage.is_bottleneck else " "
    actors = str(stage.actors_ready)
    if stage.actors_pending:
        actors += f"+{stage.actors_pending}"
    if stage.speed_tasks_per_s is not None:
        actors += f" {pen.sign('×', 'x')} {short(stage.speed_tasks_per_s)}"
    queue = f"{count(stage.queue_in)} {pen.sign('→', '>')} {count(stage.queue_out)}"
    cpu = "" if stage.cpu_percent is None else f"{stage.cpu_percent:.0f} %"
    memory = "" if stage.memory_gb is None else f"{stage.memory_gb:.1f} GB"
    return [
        Text(f"{mark} {plain(stage.name)}", ODD if stage.is_bottleneck else ""),
        functools.partial(_bar, share, style=style, pen=pen),
        Text(f"{count(stage.tasks_completed)} of {count(stage.tasks_known)}"),
        Text(queue),
        Text(actors),
        Text(cpu, DIM),
        Text(memory, DIM),
        Text("bottleneck" if stage.is_bottleneck else "", ODD),
    ]


def _bar(share: float, width: int, *, style: str, pen: Pen) -> Text:
    return bar(share, width, pen, style)
