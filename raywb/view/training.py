"""Stages that log rows as a person reads them: step, loss and its course, pace, slowest rank."""

from __future__ import annotations

import functools

from rich.text import Text

from raywb.live import StageProgress
from raywb.reports import StageStatus, Status
from raywb.view.drawing import (
    BAD,
    DIM,
    ODD,
    Column,
    Pen,
    columns,
    count,
    cut,
    duration,
    number,
    plain,
    short,
    sparkline,
)

__all__ = ["training_lines"]

#: A stage whose newest row is older than this is quiet, in seconds; slow steps are allowed for.
QUIET_S = 60.0


def _layout(mains: set[str | None]) -> list[Column]:
    """Where all stages show the same metric, its name is a title, else there is a column of it."""
    same = plain(next(iter(mains)) or "") if len(mains) == 1 else "value"
    return [
        Column(Text("stages", "bold"), shrinks_to=18),
        Column("step", right=True),
        Column("", right=True, shrinks_to=6, keep=2),
        Column(same, right=True, shrinks_to=7),
        Column("", drawn=(6, 60), keep=4),
        Column("pace", right=True, keep=5),
        Column("ranks", right=True, keep=1),
        Column("slowest", keep=3),
    ]


def training_lines(status: Status, pen: Pen, limit: int) -> list[Text]:
    """The stages, in at most ``limit`` lines: those that log now, by name, then the latest."""
    live = status.live
    if not live.stages or limit < 1:
        return []
    ordered = sorted(live.stages, key=lambda one: _order(one, pen))
    listed = ordered[: max(limit - 1, 0)]
    hidden = len(ordered) - len(listed) + live.more_stages
    if hidden and listed:
        listed, hidden = listed[:-1], hidden + 1
    names = {one.run.epoch: one.run.job_type or one.run.name for one in status.stage_runs}
    of_ranks = {(one.run_id, one.stage): one for one in status.stages}
    ids = {one.run.epoch: one.run.id for one in status.stage_runs}
    ids[status.run.epoch] = status.run.id
    rows = [
        _cells(
            one,
            names.get(one.run),
            of_ranks.get((ids.get(one.run, ""), one.stage or names.get(one.run, ""))),
            pen,
        )
        for one in listed
    ]
    mains = {one.main for one in listed if one.main is not None}
    if len(mains) == 1:
        rows = [[*row[:2], Text(), *row[3:]] for row in rows]
    title, lines = (
        columns(_layout({*mains} or {None}), rows, pen) if rows else (Text("stages", "bold"), [])
    )
    if hidden:
        active = sum(not _is_quiet(one, pen) for one in ordered[len(listed) :])
        text = f"and {count(hidden)} more"
        text += f", at least {active} of them with rows in the last minute" if active else ""
        if not listed:
            return [
                cut(Text().append("stages  ", "bold").append(f"{count(hidden)} log rows", ""), pen)
            ]
        lines.append(cut(Text(text, DIM), pen))
    return [title, *lines]


def _is_quiet(one: StageProgress, pen: Pen) -> bool:
    step_s = 1 / one.steps_per_s if one.steps_per_s else 0.0
    return pen.ago_s(one.time_s) > max(QUIET_S, 3 * step_s)


def _order(one: StageProgress, pen: Pen) -> tuple[bool, float, str, int]:
    quiet = _is_quiet(one, pen)
    return quiet, -one.time_s if quiet else 0.0, one.stage, one.run


def _cells(
    one: StageProgress, own_run: str | None, ranks: StageStatus | None, pen: Pen
) -> list[Text | functools.partial[Text]]:
    name = one.stage or own_run or "(no stage)"
    if own_run and one.stage:
        name = f"{own_run}: {one.stage}"
    quiet = _is_quiet(one, pen)
    value = one.metrics.get(one.main) if one.main is not None else None
    broken = value is not None and (value != value or value in (float("inf"), -float("inf")))
    if quiet:
        pace = Text(f"{duration(pen.ago_s(one.time_s))} ago", DIM)
    elif one.steps_per_s is None or one.steps_per_s <= 0:
        pace = Text("")
    else:
        slow = one.steps_per_s < 1
        text = f"{short(1 / one.steps_per_s)} s/step" if slow else f"{short(one.steps_per_s)}/s"
        pace = Text(text)
    return [
        Text(plain(name), DIM if quiet else ""),
        Text("" if one.step is None else f"{one.step:,.6g}" if one.step % 1 else count(one.step)),
        Text(plain(one.main or ""), DIM),
        Text("" if value is None else number(value), BAD if broken else ""),
        functools.partial(_curve, one.history, pen=pen, style=DIM if quiet else "cyan"),
        pace,
        _ranks(one, ranks),
        _slowest(one, ranks),
    ]


def _curve(values: list[float], width: int, *, pen: Pen, style: str) -> Text:
    return sparkline(values if len(values) > 1 else [], width, pen, style)


def _ranks(one: StageProgress, ranks: StageStatus | None) -> Text:
    if ranks is not None:
        missing = ranks.attached < ranks.world_size
        return Text(f"{ranks.attached} of {ranks.world_size}", ODD if missing else "")
    return Text("" if one.ranks is None else str(one.ranks))


def _slowest(one: StageProgress, ranks: StageStatus | None) -> Text:
    """Ranks that lag or are silent, else the one that came last at the newest step."""
    if ranks is not None and ranks.slow_ranks:
        named = ", ".join(str(rank.rank) for rank in ranks.slow[:3])
        more = ranks.slow_ranks - len(ranks.slow[:3])
        ranks_of = "rank" if ranks.slow_ranks == 1 else "ranks"
        return Text(f"{ranks_of} {named}{f' and {more} more' if more > 0 else ''} slow", ODD)
    if one.slowest_rank is None:
        return Text("")
    spread_s = one.rank_spread_s
    if spread_s is None:
        return Text(f"rank {one.slowest_rank}")
    spread = f"{spread_s * 1000:.0f} ms" if spread_s < 1 else f"{short(spread_s)} s"
    return Text(f"rank {one.slowest_rank} +{spread}")
