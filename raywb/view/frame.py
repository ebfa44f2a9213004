"""The whole picture of a status, fitted to a terminal: never wider, never higher than it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.text import Text

from raywb.reports import Status
from raywb.view.delivery import Pace, alert_lines, delivery_lines, has_losses
from raywb.view.drawing import DIM, GOOD, ODD, Pen, at_ends, cut, joined, middle_cut, plain
from raywb.view.pipelines import pipeline_lines
from raywb.view.training import training_lines
from raywb.view.usage import usage_lines

__all__ = ["frame_lines", "head_lines", "nothing_yet"]

#: A part that would need more lines than this is summed up, however high the terminal is.
MOST_LINES = 60

#: What is wrong and odd gets at most this part of the lines: the rest of the picture stays.
ALERT_SHARE = 8

#: With so many lines the parts stand apart, also when not everything is shown for it.
AIRY_LINES = 30

_MODE_STYLES = {"online": GOOD, "offline": "", "disabled": ODD}


def head_lines(status: Status, pen: Pen) -> list[Text]:
    """Which run it is, where it is to be seen, and where the service answers."""
    run = status.run
    state = Text("finished", GOOD) if status.finished else Text("open", "cyan")
    if run.provisional and not status.finished:
        state = Text("open, provisional", ODD)
    group = f"group {plain(run.group)}" if run.group else "no group"
    if run.group and run.group_source:
        group += f" (from {plain(run.group_source)})"
    clock = Text(time.strftime("%H:%M:%S", time.localtime(pen.now_s)), DIM)
    name = Text().append("raywb  ", DIM).append(plain(run.name), "bold")
    told: list[Text | str | None] = [state, Text(run.mode, _MODE_STYLES.get(run.mode, ""))]
    width = pen.width - clock.cell_len - 2
    room = Pen(max(width, 10), pen.now_s, pen.ascii_only)
    first = joined([name, *told, Text(group)], room)
    service = f"service {plain(status.address or '-')}"
    if status.incarnation > 1:
        service += f", start {status.incarnation}"
    right = Text(service, DIM)
    place = middle_cut(run.url or run.dir, max(pen.width - right.cell_len - 2, 10), pen)
    return [at_ends(first, clock, pen), at_ends(Text(place), right, pen)]


def nothing_yet(status: Status) -> list[Text]:
    """What to do when nobody has logged anything."""
    if status.live.series or status.received_rows or status.finished:
        return []
    if status.sources:
        return [Text("No rows yet: they appear here after the first client.log({...}).", DIM)]
    return [
        Text("Nobody logs yet. In any task, actor or driver of this cluster:", DIM),
        Text('    client = raywb.attach("training"); client.log({"loss": 0.5}, step=1)'),
    ]


def frame_lines(
    status: Status,
    pen: Pen,
    height: int | None,
    *,
    pace: Pace | None = None,
    trouble: Sequence[str] = (),
    foot: Text | None = None,
) -> list[Text]:
    """The picture.

    Each part gets the lines that it must have, then more of them in turn while there are any. Where
    something is lost, what is said of that comes before the pipelines, the stages and the nodes.

    Args:
        status: what is shown.
        pen: with what.
        height: lines that there are; None where it does not matter.
        pace: how fast rows come and go.
        trouble: what the viewer itself has to say.
        foot: the last line.
    """
    head = head_lines(status, pen)
    alerts = MOST_LINES if height is None else max(height // ALERT_SHARE, 3)
    empty = [cut(line, pen) for line in nothing_yet(status)]
    parts: list[tuple[int, Callable[[int], list[Text]]]] = [
        (2, lambda limit: alert_lines(status, pen, min(limit, alerts), trouble)),
        (3, lambda limit: pipeline_lines(status.live, pen, limit)),
        (3, lambda limit: training_lines(status, pen, limit)),
        (2, lambda limit: usage_lines(status, pen, limit)),
        (3, lambda limit: delivery_lines(status, pen, limit, pace)),
    ]
    natural = [len(draw(MOST_LINES)) for _, draw in parts]
    room = len(parts) * MOST_LINES
    gaps = 1
    if height is not None:
        there = sum(1 for lines in natural if lines) + bool(empty)
        room = height - len(head) - len(empty) - (foot is not None)
        gaps = 1 if room - there >= min(sum(natural), AIRY_LINES) else 0
        room -= gaps * there
    turns = [0, 4, 1, 2, 3] if has_losses(status) else [0, 1, 2, 3, 4]
    limits = _shares([least for least, _ in parts], natural, room, turns)
    draws = [draw for _, draw in parts]
    blocks = [head, empty, *_drawn(draws, limits, natural, room, turns)]
    lines: list[Text] = []
    for block in blocks:
        if block:
            lines += [Text()] * gaps if lines else []
            lines += block
    if height is None:
        return [*lines, foot] if foot is not None else lines
    if foot is not None:
        lines = lines[: height - 1]
        lines += [Text()] * (height - 1 - len(lines)) + [cut(foot, pen)]
    return lines[:height]


def _shares(
    least: Sequence[int], natural: Sequence[int], room: int, turns: Sequence[int]
) -> list[int]:
    """How many lines each part gets: first what it must have, then one by one in turn."""
    limits = [0] * len(natural)
    for most in (least, natural):
        while room > 0:
            wanting = [n for n in turns if limits[n] < min(most[n], natural[n])]
            if not wanting:
                break
            for n in wanting[:room]:
                limits[n] += 1
            room -= len(wanting[:room])
    return limits


def _drawn(
    draws: Sequence[Callable[[int], list[Text]]],
    limits: Sequence[int],
    natural: Sequence[int],
    room: int,
    turns: Sequence[int],
) -> list[list[Text]]:
    """The parts; lines that one leaves unused, since they are too few for it, go to another."""
    drawn = [draw(limit) for draw, limit in zip(draws, limits, strict=True)]
    limits = list(limits)
    grew = True
    while grew:
        grew = False
        spare = room - sum(map(len, drawn))
        for n in turns if spare > 0 else ():
            for limit in range(limits[n] + 1, min(limits[n] + spare, MOST_LINES) + 1):
                if len(drawn[n]) >= natural[n]:
                    break
                longer = draws[n](limit)
                if len(drawn[n]) < len(longer) <= len(drawn[n]) + spare:
                    spare -= len(longer) - len(drawn[n])
                    drawn[n], limits[n], grew = longer, limit, True
                    break
    return drawn
