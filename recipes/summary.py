"""The last words of a recipe: where every row went, where the W&B run is, what to type next."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Mapping
from pathlib import Path

from recipes.stages.dataset import DataPrepResult
from recipes.stages.layout import OutputLayout
from recipes.stages.receipts import Totals
from recipes.tracking import TrackedRun

__all__ = ["commands_for_run", "data_in_words", "rows_in_words", "run_in_words"]


def data_in_words(
    result: DataPrepResult, layout: OutputLayout, *more: tuple[str, object]
) -> list[tuple[str, object]]:
    """Say what data preparation made, in labelled lines, with a recipe's own behind the tokens."""
    totals = result.totals
    there = totals.shards - result.shards_made
    removed = f", {result.shards_removed} outdated removed" if result.shards_removed else ""
    return [
        ("rows", rows_in_words(totals)),
        ("tokens", f"{totals.tokens:,}, vocabulary {result.vocabulary_size:,}"),
        *more,
        (
            "shards",
            f"{totals.shards:,}: {result.shards_made:,} made now, {there:,} already there{removed}",
        ),
        ("bottleneck", result.bottleneck_stage),
        ("data", layout.blend),
    ]


def rows_in_words(totals: Totals) -> str:
    """Say where every row went: ``120 in = 117 kept + 2 filtered (empty 2) + 1 errors (…)``."""
    return (
        f"{totals.rows_in:,} in = {totals.rows_kept:,} kept"
        f" + {_kinds('filtered', totals.rows_filtered)} + {_kinds('errors', totals.rows_errors)}"
    )


def _kinds(name: str, counts: Mapping[str, int]) -> str:
    by_kind = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
    return f"{sum(counts.values()):,} {name}" + (f" ({by_kind})" if by_kind else "")


def run_in_words(run: TrackedRun) -> list[tuple[str, str]]:
    """Say where the W&B run is, and what of it was delivered, in labelled lines."""
    if run.info is None:
        return []
    info = run.report.run if run.report is not None else run.info
    lines = [("W&B run", f"{info.name} ({info.mode}), {info.url or info.dir}")]
    if run.report is not None:
        lines.append(("delivered", _delivery(run)))
    return lines


def commands_for_run(run: TrackedRun, started_here: bool) -> list[tuple[str, str]]:
    """Return the commands that show, upload or finish the W&B run, each with what it does."""
    if run.info is None or run.info.mode == "disabled":
        return []
    folder = Path(run.info.dir, "wandb")
    commands = [(f"wandb beta leet {shlex.quote(str(folder))}", "look at the run here")]
    if run.info.mode == "offline":
        segments = sorted(glob.glob(f"{glob.escape(str(folder))}/offline-run-*"))
        paths = shlex.join(segments) if segments else f"{shlex.quote(str(folder))}/offline-run-*"
        commands.append((f"wandb sync {paths}", "upload it"))
    if not started_here:
        commands.append(("raywb finish", "end the cluster's run when all its jobs are done"))
    return commands


def _delivery(run: TrackedRun) -> str:
    report = run.report
    assert report is not None
    text = f"{report.delivered_rows:,} of {report.received_rows:,} rows"
    lost = {reason: count for reason, count in report.lost.items() if count}
    if lost:
        text += ", lost: " + ", ".join(f"{reason} {count:,}" for reason, count in lost.items())
    if report.undelivered_rows:
        text += f", still undelivered: {report.undelivered_rows:,}"
    return text
