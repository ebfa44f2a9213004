"""Running a recipe's stages on cosmos-xenna, watched by raywb and shown on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import attrs
from cosmos_xenna.pipelines.v1 import (
    PipelineConfig,
    PipelineSpec,
    StageSpec,
    StreamingSpecificSpec,
    run_pipeline,
)
from ray.exceptions import RayTaskError

from recipes.errors import PipelineError, RecipeError
from recipes.terminal import Snapshot, StageProgress, Terminal
from recipes.tracking import ObservabilitySettings, TrackedRun

if TYPE_CHECKING:
    from raywb.xenna import XennaWandbStatsHook

__all__ = ["PipelineIdentity", "root_cause", "run_stages"]


@dataclass(frozen=True)
class PipelineIdentity:
    """What raywb notes beside the metrics of a pipeline."""

    pipeline_kind: str
    run_hash: str
    run_dir: str
    dataset_names: tuple[str, ...]


def run_stages(
    tasks: Sequence[Any],
    stages: Sequence[StageSpec],
    *,
    identity: PipelineIdentity,
    observability: ObservabilitySettings,
    run: TrackedRun,
    terminal: Terminal,
    unobserved_progress: Snapshot,
) -> tuple[list[Any], str | None]:
    """Send tasks through stages; return what the last one gave, and the stage that held it up.

    Args:
        tasks: The input of the first stage.
        stages: The stages, with their numbers of workers.
        identity: What is noted beside the metrics.
        observability: Which metrics are kept, and how often xenna takes them.
        run: The W&B run.
        terminal: Where progress is shown.
        unobserved_progress: What to show when no metrics are kept.

    Raises:
        PipelineError: A stage failed, with the cause's own words; a RecipeError passes as it is.
    """
    config: dict[str, Any] = {
        "logging_interval_s": observability.pipeline_logging_interval_s,
        "return_last_stage_outputs": True,
        "mode_specific": StreamingSpecificSpec(),
    }
    try:
        with run.pipeline_stats(observability, **vars(identity)) as hook:
            progress = unobserved_progress
            if hook is not None:
                progress = _snapshots_of(hook)
                if "stats_callback" in attrs.fields_dict(PipelineConfig):
                    config["stats_callback"] = hook.stats_callback
            spec = PipelineSpec(list(tasks), list(stages), PipelineConfig(**config))
            with terminal.progress(progress):
                results = run_pipeline(spec)
        return list(results or []), hook.bottleneck_stage if hook is not None else None
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, RecipeError):
            raise cause from error
        raise PipelineError(f"the pipeline failed: {type(cause).__name__}: {cause}") from error


def _snapshots_of(hook: XennaWandbStatsHook) -> Snapshot:
    def snapshot() -> list[StageProgress]:
        return [
            (stage.stage, stage.tasks_completed, stage.tasks_expected)
            for stage in hook.progress() or ()
        ]

    return snapshot


def root_cause(error: BaseException) -> BaseException:
    """Return what a worker raised, out of the wrappers that Ray and xenna put around it."""
    while True:
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner
