"""The recommended charts, as plain data: sections of panels over the axes that raywb logs.

Names of metrics are those of the run's rows; a test compares them with rows that were logged.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

__all__ = ["DEFAULT_STAGES", "Panel", "Section", "recommended_sections"]

#: Stages of the recipes, charted as long as no run says which stages it has.
DEFAULT_STAGES = (
    "training/pretrain",
    "validation/pretrain",
    "training/sft",
    "validation/sft",
)

_PIPELINE_AXIS = "xenna/pipeline_duration_s"
_NODES_AXIS = "nodes/time_s"


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """One line plot.

    Attributes:
        x: the metric on the x-axis; None is W&B's row number.
        y: metrics by name.
        y_regex: metrics by a pattern, where names depend on the run; W&B matches it anywhere in a
            name.
    """

    title: str
    x: str | None
    y: tuple[str, ...] = ()
    y_regex: str | None = None


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Panels below a heading."""

    name: str
    panels: tuple[Panel, ...]
    is_open: bool = True


def recommended_sections(stages: Sequence[str] = DEFAULT_STAGES) -> list[Section]:
    """All sections.

    Args:
        stages: stages with an axis of their own, ``<stage>/step``, that get panels.
    """
    return [
        _pipeline(),
        _cluster(),
        _stages(),
        _nodes(),
        *([_training(stages)] if stages else []),
        _delivery(),
    ]


def _over_pipeline(title: str, *names: str) -> Panel:
    return Panel(title=title, x=_PIPELINE_AXIS, y=tuple(f"xenna/{name}" for name in names))


def _pipeline() -> Section:
    return Section(
        name="Pipeline",
        panels=(
            _over_pipeline("Progress (%)", "progress"),
            _over_pipeline(
                "Inputs and outputs per second", "inputs_processed_per_s", "outputs_per_s"
            ),
            _over_pipeline("Inputs left, outputs", "num_input_remaining", "num_outputs"),
            _over_pipeline("Bottleneck (index of the stage)", "bottleneck_stage_index"),
        ),
    )


def _cluster() -> Section:
    return Section(
        name="Cluster",
        panels=(
            _over_pipeline("CPUs", "cluster/total_cpus", "cluster/avail_cpus"),
            _over_pipeline("Memory (GB)", "cluster/total_mem_gb", "cluster/avail_mem_gb"),
            _over_pipeline("GPUs", "cluster/total_gpus", "cluster/avail_gpus"),
        ),
    )


def _stages() -> Section:
    kinds = {
        "Throughput (tasks per second)": "speed_tasks_per_s",
        "Input queues": "queue_in",
        "Output queues": "queue_out",
        "Actors running": "actors_running",
        "Actors idle": "actors_idle",
        "Actors pending": "actors_pending",
        "Tasks completed": "tasks_completed",
        "CPU of a stage (%)": "resource/cpu_util_pct",
        "Memory of a stage (GB)": "resource/mem_gb",
    }
    return Section(
        name="Stages",
        panels=tuple(
            Panel(title=title, x=_PIPELINE_AXIS, y_regex=f"^xenna/stage/[^/]+/{name}$")
            for title, name in kinds.items()
        ),
    )


def _over_nodes(title: str, *names: str) -> Panel:
    return Panel(title=title, x=_NODES_AXIS, y=tuple(f"nodes/{name}" for name in names))


def _nodes() -> Section:
    return Section(
        name="Nodes",
        panels=(
            _over_nodes("CPU (%)", "mean/cpu_percent"),
            _over_nodes("Memory (%)", "mean/memory_percent"),
            _over_nodes("GPU (%)", "mean/gpu_percent"),
            _over_nodes("GPU memory (%)", "mean/gpu_memory_percent"),
            _over_nodes("Share of GPUs that are idle", "gpu_idle_share"),
            _over_nodes(
                "Network (MB/s)", "mean/network_received_mb_per_s", "mean/network_sent_mb_per_s"
            ),
            _over_nodes("Disk (%)", "mean/disk_percent"),
            _over_nodes("Object store (%)", "mean/object_store_percent"),
            _over_nodes("Nodes alive, nodes that answered", "alive", "answered"),
        ),
    )


def _training(stages: Sequence[str]) -> Section:
    """Each stage over its own step, since a panel has one x-axis."""
    panels: list[Panel] = []
    for stage in stages:
        axis = f"{stage}/step"
        panels.append(Panel(title=f"{stage}: loss", x=axis, y=(f"{stage}/loss",)))
        panels.append(Panel(title=f"{stage}: per second", x=axis, y_regex=f"^{stage}/.*_per_s$"))
        if not stage.startswith("validation"):
            panels.append(
                Panel(title=f"{stage}: slowest rank", x=axis, y=(f"{stage}/slowest_rank",))
            )
            panels.append(
                Panel(title=f"{stage}: spread of ranks (s)", x=axis, y=(f"{stage}/rank_spread_s",))
            )
    return Section(name="Training", panels=tuple(panels))


def _delivery() -> Section:
    return Section(
        name="Delivery",
        is_open=False,
        panels=(
            Panel(title="Rows on the way to W&B", x=None, y=("raywb/backlog_rows",)),
            Panel(title="Rows lost, by reason", x=None, y_regex="^raywb/lost/"),
            Panel(
                title="Values rejected, rows late", x=None, y=("raywb/rejected", "raywb/late_rows")
            ),
        ),
    )
