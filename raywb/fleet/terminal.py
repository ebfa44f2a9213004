"""A report as a person reads it in a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raywb.fleet.collector import FleetReport
from raywb.fleet.details import FleetDetails

__all__ = ["render_report"]

#: Silent runs that are listed one by one.
LISTED_RUNS = 10


def render_report(report: FleetReport) -> RenderableType:
    """The metrics, and what stands behind them where that was asked for."""
    window = f"{report.window.hours:g} h up to {report.window.end}"
    title = f"{report.entity}/{report.project}, {window}"
    parts: list[RenderableType] = [Text(title, style="bold"), _metrics(report)]
    if report.details is not None:
        parts += [Text(), _details(report, report.details)]
    parts += [Text(f"! missing: {one}", style="bold red") for one in report.incomplete]
    return Group(*parts)


def _metrics(report: FleetReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for metric in report.metrics:
        table.add_row(metric.name, number(metric.value))
    return table


def number(value: int | float) -> str:
    """A value with as many digits as say something."""
    return str(value) if isinstance(value, int) else f"{value:,.2f}"


def _details(report: FleetReport, details: FleetDetails) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    requests = f"{report.runs} runs, {report.requests} requests, {report.read_s:.1f} s"
    table.add_row("read", requests)
    table.add_row("GPU-hours", _gpu_hours(details))
    if details.runs_without_duration:
        text = f"{details.runs_without_duration} ended runs, whose times contradict each other"
        table.add_row("no duration", text)
    for key, count in details.unusable.items():
        table.add_row("no number", Text(f"{key} of {count} {'run' if count == 1 else 'runs'}"))
    table.add_row("throughput", _throughput(details))
    # As texts: in a string rich looks for markup, and names of runs have brackets as they like.
    table.add_row("silent", Text(_silent(details)))
    for note in report.notes:
        table.add_row("note", Text(note))
    return table


def _gpu_hours(details: FleetDetails) -> str:
    recorded = f"{details.recorded_gpu_hours:,.2f} recorded by {details.recorded_runs} runs"
    assumed = f"{details.assumed_gpu_hours:,.2f} assumed for {details.assumed_runs} runs"
    return f"{recorded}, {assumed}"


def _throughput(details: FleetDetails) -> RenderableType:
    if not details.throughput:
        return Text("no run of main has a value")
    lines = Text()
    for one in details.throughput:
        lines.append(f"{one.key} {one.latest:,.2f}")
        if one.baseline is None:
            lines.append(f" (only {one.baseline_runs} earlier runs to compare with)")
        elif one.change_pct is None:
            lines.append(f" (the median of {one.baseline_runs} earlier runs is {one.baseline:g})")
        else:
            lines.append(f" ({one.change_pct:+.1f} % against the median {one.baseline:,.2f}")
            lines.append(f" of {one.baseline_runs} earlier runs)")
        if one.regression:
            lines.append(f" REGRESSION in {one.run}", style="bold red")
        lines.append("\n")
    lines.right_crop(1)
    return lines


def _silent(details: FleetDetails) -> str:
    if not details.silent:
        return "no run that claims to be running"
    lines = []
    for run in details.silent[:LISTED_RUNS]:
        ago = (
            "never heard of" if run.silent_s is None else f"not heard of for {_span(run.silent_s)}"
        )
        lines.append(f"{run.name} ({run.id}) claims to be running, {ago}")
    more = len(details.silent) - LISTED_RUNS
    return "\n".join([*lines, *([f"and {more} more"] if more > 0 else [])])


def _span(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
