"""A dataset from its plan to its blend: what the data preparation of every recipe shares.

DatasetPlan      inputs listed and cut, tokenizer ready            before there is a cluster
make_dataset     send the shards through the stages, add up, check, write the blend
report           the totals, into the W&B run
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cosmos_xenna.pipelines.v1 import StageSpec

from recipes.errors import CountsError, InputError
from recipes.pipeline import PipelineIdentity, run_stages
from recipes.stages.download import remove_scratch_everywhere
from recipes.stages.layout import OutputLayout
from recipes.stages.receipts import Receipt, Totals, add_up
from recipes.stages.scratch import Scratch
from recipes.stages.shards import Shard
from recipes.stages.tokenizer import PreparedTokenizer
from recipes.terminal import Terminal
from recipes.tracking import ObservabilitySettings, TrackedRun

__all__ = ["DataPrepResult", "DatasetPlan", "ShardResult", "make_dataset", "report"]


@dataclass(frozen=True)
class DatasetPlan:
    """What is to be made, of what, and where."""

    layout: OutputLayout
    shards: tuple[Shard, ...]
    scratch: Scratch
    tokenizer: PreparedTokenizer
    #: What a row of the input is called once it is kept, such as ``document``.
    unit: str
    #: When the recipe began, by ``time.monotonic()``.
    began: float


@dataclass(frozen=True)
class ShardResult:
    """A finished shard, and whether this start made it."""

    receipt: Receipt
    made_now: bool


@dataclass(frozen=True)
class DataPrepResult:
    """What came out, for the summary."""

    totals: Totals
    shards_made: int
    shards_removed: int
    duration_s: float
    vocabulary_size: int
    bottleneck_stage: str | None


def make_dataset(
    plan: DatasetPlan,
    stages: Sequence[StageSpec],
    *,
    identity: PipelineIdentity,
    observability: ObservabilitySettings,
    run: TrackedRun,
    terminal: Terminal,
    write_blend: Callable[[Sequence[Receipt]], None],
) -> DataPrepResult:
    """Make all shards that are missing, and the blend; the Ray cluster is there.

    Args:
        plan: What is made.
        stages: From a shard to a :class:`ShardResult`.
        identity: What is noted beside the pipeline's metrics.
        observability: Which of these are kept.
        run: The W&B run.
        terminal: Where progress is shown.
        write_blend: Writes the recipe's blend from the receipts of all shards.

    Raises:
        RecipeError: One of its subclasses; a later start goes on where this one ended.
    """
    layout, shards = plan.layout, plan.shards
    try:
        results, bottleneck = run_stages(
            shards,
            stages,
            identity=identity,
            observability=observability,
            run=run,
            terminal=terminal,
            unobserved_progress=lambda: [("shards", layout.count_receipts(), len(shards))],
        )
    finally:
        remove_scratch_everywhere(plan.scratch)
    totals = _checked_totals(plan, results)
    write_blend([result.receipt for result in results])
    return DataPrepResult(
        totals=totals,
        shards_made=sum(result.made_now for result in results),
        shards_removed=_remove_surplus(layout, shards),
        duration_s=time.monotonic() - plan.began,
        vocabulary_size=plan.tokenizer.vocabulary_size,
        bottleneck_stage=bottleneck,
    )


def _checked_totals(plan: DatasetPlan, results: Sequence[ShardResult]) -> Totals:
    """Add up what all shards hold, after making sure that none is missing or there twice."""
    expected = sorted(shard.name for shard in plan.shards)
    found = sorted(result.receipt.shard for result in results)
    if found != expected:
        raise CountsError(
            f"{len(expected)} shards went into the pipeline and {len(found)} came out; "
            f"missing: {sorted(set(expected) - set(found))[:5]}; please report this"
        )
    totals = add_up(result.receipt for result in results)
    if not totals.rows_kept:
        raise InputError(
            f"the input holds no {plan.unit}: {totals.rows_in} rows read, left out: "
            f"{totals.rows_filtered | totals.rows_errors}"
        )
    return totals


def _remove_surplus(layout: OutputLayout, shards: tuple[Shard, ...]) -> int:
    """Remove shards of an earlier, larger input; the blend no longer names them."""
    surplus = layout.shard_names() - {shard.name for shard in shards}
    for name in surplus:
        layout.remove_shard(name)
    return len(surplus)


def report(
    run: TrackedRun, result: DataPrepResult, more: Mapping[str, float] | None = None
) -> None:
    """Put the totals into the W&B run, with what a recipe has to add to them."""
    totals = result.totals
    counts: dict[str, float] = {
        "rows_in": totals.rows_in,
        "rows_kept": totals.rows_kept,
        "rows_filtered": sum(totals.rows_filtered.values()),
        "rows_errors": sum(totals.rows_errors.values()),
        **{f"rows_filtered/{kind}": count for kind, count in totals.rows_filtered.items()},
        **{f"rows_errors/{kind}": count for kind, count in totals.rows_errors.items()},
        "tokens": totals.tokens,
        "size_bytes": totals.size_bytes,
        "shards": totals.shards,
        "shards_made": result.shards_made,
        "duration_s": result.duration_s,
        **(more or {}),
    }
    run.log(counts)
    run.summary(counts)
