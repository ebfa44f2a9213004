"""What the newest row of a xenna pipeline says; the keys are those of SPEC D."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from raywb.live import PipelineProgress, PipelineStageProgress
from raywb.rows import Scalar
from raywb.service.outbox import OutRow

__all__ = ["PIPELINE_KEYS", "LivePipeline", "describe_pipeline"]

#: Keys that every row of a pipeline has, its axis first; by them it is known.
PIPELINE_KEYS = ("pipeline_duration_s", "main_loop_rate_hz", "progress", "num_input_remaining")

#: Characters of an error that are kept.
MAX_ERROR_CHARS = 500

_Number = int | float


class LivePipeline:
    """One pipeline, and its newest row.

    Attributes:
        row: that one.
        seen: its number among the rows of all stages and pipelines.
    """

    __slots__ = ("name", "row", "seen", "ticks")

    def __init__(self, name: str, ticks: Iterator[int]) -> None:
        self.name = name
        self.ticks = ticks
        self.row: OutRow | None = None
        self.seen = -1

    def take(self, row: OutRow) -> None:
        """Take one row in."""
        self.row, self.seen = row, next(self.ticks)

    def forget(self) -> None:
        """Nothing of it depends on the combination of keys."""

    @property
    def is_running(self) -> bool:
        """Whether its newest row says so."""
        if self.row is None:
            return False
        prefix = self.name + "/" if self.name else ""
        keys = ("progress", "error_type", "error_message")
        found = {key: self.row.metrics.get(prefix + key) for key in keys}
        return _state({k: v for k, v in found.items() if v is not None}) == "running"

    def describe(self, run: int) -> PipelineProgress | None:
        """The pipeline at this moment; None before its first row."""
        if self.row is None:
            return None
        return describe_pipeline(self.name, run, self.row.metrics, self.row.time_s)


def _state(row: Mapping[str, Scalar]) -> str:
    if "error_type" in row or "error_message" in row:
        return "failed"
    return "done" if (_number(row, "progress") or 0.0) >= 100 else "running"


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
    state = _state(row)
    return PipelineProgress(
        name=name,
        run=run,
        state=state,
        percent=percent,
        duration_s=_number(row, "pipeline_duration_s") or 0.0,
        inputs_left=_count(row, "num_input_remaining"),
        outputs=_count(row, "num_outputs"),
        stages=_stages(row),
        time_s=time_s,
        inputs_per_s=_number(row, "inputs_processed_per_s"),
        outputs_per_s=_number(row, "outputs_per_s"),
        error=_error(row) if state == "failed" else None,
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
    # A product of two odd numbers may be infinite.
    return -(-remaining // max(round(min(per_task, 2.0**53)), 1))


def _error(row: Mapping[str, Scalar]) -> str:
    kind, message = row.get("error_type"), row.get("error_message")
    text = ": ".join(str(part) for part in (kind, message) if part)
    if stage := row.get("error_stage"):
        text = f"{stage}: {text}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"


def _number(row: Mapping[str, Scalar], key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, (str, bool)) or value is None or not math.isfinite(value):
        return None
    return float(value)


def _count(row: Mapping[str, Scalar], key: str) -> int:
    value = _number(row, key)
    return int(value) if value is not None and abs(value) < 2**53 else 0
