"""Status and finish report as a person reads them in a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raywb.reports import FinishReport, RunInfo, Status

__all__ = ["render_report", "render_status"]

#: Sources that are listed one by one; with more of them, those heard last.
LISTED_SOURCES = 20


def _facts(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _run_facts(run: RunInfo) -> list[tuple[str, str]]:
    group = f"{run.group} (from {run.group_source})" if run.group else "(none)"
    facts = [("run", f"{run.name} ({run.id})"), ("group", group), ("mode", run.mode)]
    if run.url:
        facts.append(("page", run.url))
    return [*facts, ("files", run.dir)]


def _losses(lost: dict[str, int], rejected: int) -> str:
    parts = [f"{count} {reason}" for reason, count in sorted(lost.items())]
    if rejected:
        parts.append(f"{rejected} values rejected")
    return ", ".join(parts) or "none"


def render_status(status: Status) -> RenderableType:
    """The run, its delivery, its sources, and what is wrong."""
    state = "finished" if status.finished else "open"
    if status.run.provisional and not status.finished:
        state = "open, provisional (no start() has brought settings)"
    sink = status.sink.state
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
        ("lost", _losses(status.lost, status.rejected)),
    ]
    if status.undelivered_updates:
        facts.append(("not with W&B", "; ".join(status.undelivered_updates)))
    if status.after_finish_rows:
        facts.append(("waiting", f"{status.after_finish_rows} rows came after finish()"))
    parts: list[RenderableType] = [_facts(facts), Text(), _sources(status)]
    parts += [Text(f"! {problem}", style="bold red") for problem in status.problems]
    return Group(*parts)


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
            heard = "ended" if source.ended else "not since the service's start"
        else:
            heard = f"{source.heard_ago_s:.0f} s ago"
        stages = ", ".join(source.stages) or "-"
        table.add_row(source.hostname, str(source.pid), stages, str(source.received_rows), heard)
    more = len(status.sources) - LISTED_SOURCES
    return Group(table, Text(f"and {more} more")) if more > 0 else table


def render_report(report: FinishReport) -> RenderableType:
    """How a run ended."""
    facts = [
        *_run_facts(report.run),
        ("rows", f"{report.received_rows} received, {report.delivered_rows} with W&B"),
        ("lost", _losses(report.lost, report.rejected)),
    ]
    if report.run.mode == "offline":
        facts.append(("upload", f"wandb sync {report.run.dir}/wandb/offline-run-*"))
    parts: list[RenderableType] = [_facts(facts)]
    if report.message:
        parts.append(Text(f"! {report.message}", style="bold red"))
    return Group(*parts)
