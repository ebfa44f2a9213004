"""Delivery as a person reads it in a terminal: what came, what W&B has, what is lost, who sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from rich.text import Text

from raywb.reports import Status
from raywb.view.drawing import (
    BAD,
    DIM,
    GOOD,
    ODD,
    Pen,
    count,
    counted,
    cut,
    duration,
    joined,
    plain,
)

__all__ = ["Pace", "alert_lines", "delivery_lines", "has_losses", "losses"]

#: The pace of delivery is taken over so many seconds, so that it is calm.
WINDOW_S = 10.0

#: States of W&B's side in which all is well, or is about to be.
_WELL = ("running", "finished", "opening", "disabled", "resting")


class Pace:
    """How fast rows come and go, from one status to the next."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()
        self._run = ""

    def note(self, status: Status, now_s: float) -> None:
        """Take a status in that came at ``now_s``, on any clock that never goes back."""
        seen = (now_s, status.received_rows, _with_wandb(status))
        if status.run.id != self._run or (self._seen and seen[1] < self._seen[-1][1]):
            self._seen.clear()
            self._run = status.run.id
        self._seen.append(seen)
        while len(self._seen) > 2 and self._seen[1][0] < now_s - WINDOW_S:
            self._seen.popleft()

    def rows_per_s(self) -> tuple[float, float] | None:
        """Rows that came, and that W&B got, per second; None before the second status."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (began_s, came, went), (now_s, now_came, now_went) = self._seen[0], self._seen[-1]
        passed_s = now_s - began_s
        return (now_came - came) / passed_s, max(now_went - went, 0) / passed_s


def _with_wandb(status: Status) -> int:
    return max(status.outbox_rows - status.backlog_rows, 0)


def delivery_lines(status: Status, pen: Pen, limit: int, pace: Pace | None = None) -> list[Text]:
    """Rows, losses, W&B's side and the sources, the most important first."""
    rates = pace.rows_per_s() if pace is not None else None
    came, went = ("", "") if rates is None else (f" ({_rate(r)}/s)" for r in rates)
    waiting = Text(f"{count(status.backlog_rows)} waiting", ODD if status.backlog_rows else DIM)
    merged = status.outbox_rows != status.received_rows
    rows: list[Text | str | None] = [
        Text()
        .append("delivery", "bold")
        .append(f"  {count(status.received_rows)} rows in{came}", ""),
        f"{count(_with_wandb(status))} out{went}" if status.run.mode != "disabled" else None,
        waiting,
        f"merged to {count(status.outbox_rows)}" if merged else None,
    ]
    if status.after_finish_rows:
        rows.append(Text(f"{count(status.after_finish_rows)} after finish()", ODD))
    lost = losses(status.lost, status.rejected)
    told_lost = Text("none", GOOD) if lost == "none" else Text(lost, BAD)
    if limit == 1 and has_losses(status):
        label = Text().append("delivery", "bold").append("  lost  ", DIM)
        return [joined([label.append_text(told_lost), *_missing(status)], pen)]
    lines = [
        joined(rows, pen),
        joined([Text().append("  lost      ", DIM).append_text(told_lost), *_missing(status)], pen),
        _sink(status, pen),
    ]
    if sources := _sources(status, pen):
        lines.append(sources)
    if status.stage_runs:
        lines.append(_stage_runs(status, pen))
    return lines[: max(limit, 0)]


def _rate(rows_per_s: float) -> str:
    return count(rows_per_s) if rows_per_s >= 10 or rows_per_s == 0 else f"{rows_per_s:.1f}"


def losses(lost: Mapping[str, int], rejected: int) -> str:
    """What could not be kept, by reason."""
    parts = [f"{lost[reason]} {plain(reason)}" for reason in sorted(lost)]
    if rejected:
        parts.append(f"{rejected} values rejected")
    return ", ".join(parts) or "none"


def has_losses(status: Status) -> bool:
    """Something is lost, or may be: that is said before how busy the nodes are."""
    return bool(any(status.lost.values()) or status.rejected or _missing(status))


def _missing(status: Status) -> list[Text]:
    told = []
    if unconfirmed := [one for one in status.unconfirmed if not one.quiet]:
        rows = sum(one.unacknowledged_rows or 0 for one in unconfirmed)
        text = f"{counted(len(unconfirmed), 'source')} unconfirmed ({count(rows)}+ rows)"
        told.append(Text(text, BAD))
    if status.undelivered_updates:
        updates = counted(len(status.undelivered_updates), "update")
        told.append(Text(f"{updates} not with W&B", ODD))
    return told


def _sink(status: Status, pen: Pen) -> Text:
    sink = status.sink
    state = Text(sink.state, GOOD if sink.state in _WELL else ODD)
    shown = f"{count(sink.confirmed_rows)} rows shown by its server"
    told: list[Text | str | None] = [
        Text().append("  W&B       ", DIM).append_text(state),
        shown if status.run.mode == "online" else None,
        Text(counted(sink.restarts, "restart"), ODD) if sink.restarts else None,
        Text(plain(sink.last_error), BAD) if sink.last_error and not status.finished else None,
    ]
    return joined(told, pen)


def _sources(status: Status, pen: Pen) -> Text | None:
    """How many processes send, by how they are: there may be very many."""
    if not status.sources:
        return None
    ended = [one for one in status.sources if one.ended]
    killed = sum(one.killed for one in ended)
    there = [one for one in status.sources if not one.ended]
    unheard = sum(one.heard_ago_s is None for one in there)
    silent = [one for one in there if (one.heard_ago_s or 0.0) > status.silence_s]
    hosts = len({one.hostname for one in there})
    longest_s = max((one.heard_ago_s or 0.0 for one in silent), default=0.0)
    label = Text().append("  sources   ", DIM).append(f"{count(len(there))} attached", "")
    if hosts > 1:
        label.append(f" from {count(hosts)} hosts")
    told: list[Text | str | None] = [
        label,
        Text(f"{count(len(silent))} silent, up to {duration(longest_s)}", ODD) if silent else None,
        Text(f"{count(unheard)} not heard since the service's start", DIM) if unheard else None,
        f"{count(len(ended) - killed)} ended" if len(ended) > killed else None,
        Text(f"{count(killed)} killed", ODD) if killed else None,
    ]
    return joined(told, pen)


def _stage_runs(status: Status, pen: Pen) -> Text:
    states: dict[str, int] = {}
    for one in status.stage_runs:
        states[one.state] = states.get(one.state, 0) + 1
    styles = {"running": "cyan", "finished": GOOD, "failed": BAD, "crashed": BAD}
    waiting = sum(one.backlog_rows for one in status.stage_runs)
    told: list[Text | str | None] = [
        Text().append("  own runs  ", DIM).append(f"{count(len(status.stage_runs))} of stages", ""),
        *(
            Text(f"{number_of} {state}", styles.get(state, ""))
            for state, number_of in states.items()
        ),
        Text(f"{count(waiting)} rows waiting", ODD) if waiting else None,
    ]
    return joined(told, pen)


def alert_lines(status: Status, pen: Pen, limit: int, trouble: Sequence[str] = ()) -> list[Text]:
    """What is wrong, then what is odd, one line each; of more than there is room for the count."""
    found = [Text(f"! {plain(text)}", f"bold {BAD}") for text in (*trouble, *status.problems)]
    found += [Text(f"! {plain(text)}", ODD) for text in status.warnings]
    if len(found) > limit > 0:
        more = len(found) - limit + 1
        found = [*found[: limit - 1], Text(f"! {more} more: `raywb status` has them all", DIM)]
    return [cut(line, pen) for line in found[: max(limit, 0)]]
