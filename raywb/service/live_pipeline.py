"""What the newest row of a xenna pipeline says; no state, the keys are those of SPEC D."""

from __future__ import annotations

from collections.abc import Mapping

from raywb.live import PipelineProgress, PipelineStageProgress
from raywb.rows import Scalar

__all__ = ["PIPELINE_KEYS", "describe_pipeline"]

#: Keys that every row of a pipeline has, its axis first; by them it is known.
PIPELINE_KEYS = ("pipeline_duration_s", "main_loop_rate_hz", "progress", "num_input_remaining")

#: Characters of an error that are kept.
MAX_ERROR_CHARS = 500

_Number = int | float


def describe_pipeline(
    name: str, run: int, metrics: Mapping[str, Scalar], time_s: float
) -> PipelineProgress:
    """The pipeline as one row of it tells.

    Args:
        name: its namespace; the keys have it as prefix.
        run: number of the run.
        metrics: the row.
        time_s: when it was logged.
    """
    prefix = name + "/" if name else ""
    row = {key[len(prefix) :]: value for key, value in metrics.items() if key.startswith(prefix)}
    percent = _number(row, "progress") or 0.0
    failed = "error_type" in row or "error_message" in row
    return PipelineProgress(
        name=name,
        run=run,
        state="failed" if failed else "done" if percent >= 100 else "running",
        percent=percent,
        duration_s=_number(row, "pipeline_duration_s") or 0.0,
        inputs_left=_count(row, "num_input_remaining"),
        outputs=_count(row, "num_outputs"),
        stages=_stages(row),
        time_s=time_s,
        inputs_per_s=_number(row, "inputs_processed_per_s"),
        outputs_per_s=_number(row, "outputs_per_s"),
        error=_error(row) if failed else None,
    )


def _stages(row: Mapping[str, Scalar]) -> list[PipelineStageProgress]:
    """The stages, in the order in which the row names them, which is theirs in the pipeline."""
    names: dict[str, None] = {}
    for key in row:
        if key.startswith("stage/"):
            names[key.split("/", 2)[1]] = None
    bottleneck = row.get("bottleneck_stage_index")
    found: list[PipelineStageProgress] = []
    waiting = _tasks_of_inputs(row, next(iter(names), ""))
    for index, name in enumerate(names):
        prefix = f"stage/{name}/"
        completed, queue_in = (
            _count(row, prefix + "tasks_completed"),
            _count(row, prefix + "queue_in"),
        )
        used = _count(row, prefix + "slots_used")
        found.append(
            PipelineStageProgress(
                name=name,
                tasks_completed=completed,
                tasks_known=completed + queue_in + used + waiting,
                queue_in=queue_in,
                queue_out=_count(row, prefix + "queue_out"),
                slots_used=used,
                slots_empty=_count(row, prefix + "slots_empty"),
                actors_ready=_count(row, prefix + "actors_ready"),
                actors_pending=_count(row, prefix + "actors_pending"),
                speed_tasks_per_s=_number(row, prefix + "speed_tasks_per_s"),
                cpu_percent=_number(row, prefix + "resource/cpu_util_pct"),
                memory_gb=_number(row, prefix + "resource/mem_gb"),
                is_bottleneck=bottleneck == index and not isinstance(bottleneck, bool),
            )
        )
        waiting = found[-1].queue_out
    return found


def _tasks_of_inputs(row: Mapping[str, Scalar], first: str) -> int:
    """Tasks of the first stage that the inputs make which it has not taken in.

    How many inputs a task takes is in no key, but in what was taken in so far.
    """
    remaining = _count(row, "num_input_remaining")
    rate, duration_s = _number(row, "inputs_processed_per_s"), _number(row, "pipeline_duration_s")
    taken = sum(
        _count(row, f"stage/{first}/{key}") for key in ("tasks_completed", "queue_in", "slots_used")
    )
    per_task = (rate or 0.0) * (duration_s or 0.0) / taken if taken else 1.0
    return -(-remaining // max(round(per_task), 1))


def _error(row: Mapping[str, Scalar]) -> str:
    kind, message = row.get("error_type"), row.get("error_message")
    text = ": ".join(str(part) for part in (kind, message) if part)
    if stage := row.get("error_stage"):
        text = f"{stage}: {text}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"


def _number(row: Mapping[str, Scalar], key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, (str, bool)) or value is None or value != value:
        return None
    return float(value)


def _count(row: Mapping[str, Scalar], key: str) -> int:
    value = _number(row, key)
    return int(value) if value is not None and abs(value) < 2**53 else 0
