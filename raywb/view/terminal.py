"""Status and finish report as a person reads them in a terminal."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raywb.reports import (
    FinishReport,
    RecoveryReport,
    RunInfo,
    Status,
    SyncReport,
    UnconfirmedSource,
)
from raywb.view.delivery import losses
from raywb.view.drawing import Encodable, Lines, Pen, plain
from raywb.view.nodes import render_nodes
from raywb.view.pipelines import pipeline_lines
from raywb.view.stages import render_stages
from raywb.view.training import training_lines
from raywb.view.usage import usage_lines

__all__ = ["render_recovery", "render_report", "render_status", "render_sync"]

#: Sources that are listed one by one; with more of them, those heard last.
LISTED_SOURCES = 20

#: Lines of pipelines, of stages and of nodes in a status; with more of them they are summed up.
LIVE_LINES = 16


def _facts(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text("\n".join(map(plain, value.split("\n")))))
    return table


def _add_row(table: Table, *cells: str) -> None:
    """Names come from users: nothing in them is markup, or for the terminal to obey."""
    table.add_row(*(Text(plain(cell)) for cell in cells))


def _run_facts(run: RunInfo) -> list[tuple[str, str]]:
    group = f"{run.group} (from {run.group_source})" if run.group else "(none)"
    facts = [("run", f"{run.name} ({run.id})"), ("group", group), ("mode", run.mode)]
    if run.url:
        facts.append(("page", run.url))
    if run.began_offline:
        facts.append(("began", f"offline; those files are set aside in {run.dir}/superseded"))
    return [*facts, ("files", run.dir)]


def _unconfirmed(sources: list[UnconfirmedSource]) -> list[tuple[str, str]]:
    """Which processes may have left rows behind: one line for each, and for the others a sum."""
    lines = []
    for source in sources[:LISTED_SOURCES]:
        rows = source.unacknowledged_rows
        known = "an unknown number of" if rows is None else f"at least {rows}"
        missing = "quiet when last heard" if source.quiet else f"{known} rows missing"
        where = f"{source.hostname or source.node_id[:8] or 'unknown host'} pid {source.pid}"
        at = f"{source.received_rows} rows received, to byte {source.acknowledged_bytes}"
        lines.append(f"{where}: {missing} ({at}; {source.reason})")
    if len(sources) > LISTED_SOURCES:
        lines.append(f"and {len(sources) - LISTED_SOURCES} more")
    return [("unconfirmed", "\n".join(lines))] if lines else []


def render_status(status: Status, now_s: float | None = None) -> RenderableType:
    """The run, its delivery, what it does, its sources, and what is wrong.

    Args:
        status: what is shown.
        now_s: the present, in seconds since the epoch; the clock's by default.
    """
    state = "finished" if status.finished else "open"
    if status.run.provisional and not status.finished:
        state = "open, provisional (no start() has brought settings)"
    sink = status.sink.state
    if status.run.mode == "online":
        sink += f", {status.sink.confirmed_rows} rows shown by its server"
    if status.sink.restarts:
        sink += f", restarted {status.sink.restarts} times"
    if status.sink.last_error and not status.finished:
        sink += f" ({status.sink.last_error})"
    facts = [
        *_run_facts(status.run),
        ("state", state),
        ("service", f"{status.address}, raywb {status.version}, start {status.incarnation}"),
        ("rows", f"{status.received_rows} received, {status.backlog_rows} waiting for W&B"),
        ("W&B", sink),
        ("lost", losses(status.lost, status.rejected)),
    ]
    if status.undelivered_updates:
        facts.append(("not with W&B", "; ".join(status.undelivered_updates)))
    if status.after_finish_rows:
        facts.append(("waiting", f"{status.after_finish_rows} rows came after finish()"))
    facts += _unconfirmed(status.unconfirmed)
    parts: list[RenderableType] = [_facts(facts), Text()]
    parts += [_live(status, time.time() if now_s is None else now_s), _sources(status)]
    if status.stages:
        parts += [Text(), render_stages(status.stages)]
    if status.stage_runs:
        parts += [Text(), _stage_runs(status)]
    if status.nodes:
        parts += [Text(), render_nodes(status.nodes)]
    parts += [Text(f"! {plain(warning)}", style="yellow") for warning in status.warnings]
    parts += [Text(f"! {plain(problem)}", style="bold red") for problem in status.problems]
    return Encodable(Group(*parts))


def _live(status: Status, now_s: float) -> Lines:
    """What runs, as in ``raywb watch``; the rest of the status is said in full elsewhere."""

    def draw(pen: Pen) -> list[Text]:
        parts = (
            pipeline_lines(status.live, pen, LIVE_LINES),
            training_lines(status, pen, LIVE_LINES),
            usage_lines(status, pen, LIVE_LINES) if status.live.all_nodes else [],
        )
        return [line for part in parts if part for line in (*part, Text())]

    return Lines(draw, now_s)


def _stage_runs(status: Status) -> RenderableType:
    """The runs that stages have of their own: those that are open first, then the latest."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("stage's own run", overflow="fold")
    table.add_column("state")
    for name in ("rows", "waiting"):
        table.add_column(name, justify="right")
    latest = sorted(reversed(status.stage_runs), key=lambda one: one.state != "running")
    for one in latest[:LISTED_SOURCES]:
        state = one.state
        if one.sink.last_error and one.backlog_rows:
            state += f" ({one.sink.last_error})"
        rows, waiting = str(one.received_rows), str(one.backlog_rows)
        _add_row(table, f"{one.run.name} ({one.run.id})", state, rows, waiting)
    more = len(status.stage_runs) - LISTED_SOURCES
    return Group(table, Text(f"and {more} more")) if more > 0 else table


def _sources(status: Status) -> RenderableType:
    if not status.sources:
        return Text("No process has attached yet: raywb.attach() in a task, actor or driver.")
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("host", "pid", "stages"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "heard"):
        table.add_column(name, justify="right")
    latest = sorted(status.sources, key=lambda source: (source.ended, source.heard_ago_s or 0.0))
    for source in latest[:LISTED_SOURCES]:
        if source.heard_ago_s is None:
            heard = "not since the service's start"
            if source.ended:
                heard = "killed" if source.killed else "ended"
        else:
            heard = f"{source.heard_ago_s:.0f} s ago"
        stages = ", ".join(source.stages) or "-"
        _add_row(table, source.hostname, str(source.pid), stages, str(source.received_rows), heard)
    more = len(status.sources) - LISTED_SOURCES
    return Group(table, Text(f"and {more} more")) if more > 0 else table


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def render_report(report: FinishReport) -> RenderableType:
    """How a run ended."""
    facts = [
        *_run_facts(report.run),
        ("state", report.state),
        ("rows", f"{report.received_rows} received, {report.delivered_rows} with W&B"),
        ("lost", losses(report.lost, report.rejected)),
        *_unconfirmed(report.unconfirmed),
    ]
    for one in report.stage_runs:
        rows = f"{one.received_rows} rows received, {one.delivered_rows} with W&B"
        facts.append(("stage's run", f"{one.run.name} ({one.run.id}): {one.state}, {rows}"))
    if report.run.mode == "offline":
        facts.append(("upload", f"wandb sync {report.run.dir}/wandb/offline-run-*"))
    parts: list[RenderableType] = [_facts(facts)]
    if report.message:
        parts.append(Text(plain(f"! {report.message}"), style="bold red"))
    return Encodable(Group(*parts))


def render_recovery(report: RecoveryReport) -> RenderableType:
    """What ``raywb recover`` found and did."""
    journals = _counted(report.journals, "journal")
    found = f"{report.ledger_rows} in the ledger"
    if report.journals:
        found += f", {report.new_rows} of them from {journals} on this machine"
    facts = [("directory", report.directory), ("rows", found)]
    if report.after_finish_rows:
        text = f"{report.after_finish_rows} rows came after finish() and belong to no run yet"
        facts.append(("waiting", text))
    if report.foreign_journals:
        facts.append(("passed over", f"{_counted(report.foreign_journals, 'journal')} of others"))
    damage = ", ".join(f"{count} {kind}" for kind, count in report.damage.items())
    facts += [("damage", damage or "none"), *_unconfirmed(report.unconfirmed)]
    parts: list[RenderableType] = [_facts(facts)]
    for run in report.runs:
        parts += [Text(), render_report(run)]
    for source_id, reason in report.failed.items():
        text = f"! the journal of source {source_id[:8]} is not home: {reason}"
        parts.append(Text(plain(text), style="bold red"))
    if report.nothing_to_do:
        parts.append(Text("There is nothing to do: every run is with W&B."))
    return Encodable(Group(*parts))


def render_sync(report: SyncReport) -> RenderableType:
    """What ``raywb sync`` sent."""
    if not report.runs:
        return Encodable(Text(f"There is no run in {report.directory} that could be sent."))
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for name in ("rows", "there before", "sent"):
        table.add_column(name, justify="right")
    table.add_column("page", overflow="fold")
    for run in report.runs:
        numbers = map(str, (run.rows, run.rows_before, run.rows_sent))
        _add_row(table, f"{run.run.name} ({run.run.id})", run.state, *numbers, run.run.url or "-")
    parts: list[RenderableType] = [table]
    parts += [
        Text(plain(f"! {run.run.name}: {run.error}"), style="bold red")
        for run in report.runs
        if run.error
    ]
    return Encodable(Group(*parts))
