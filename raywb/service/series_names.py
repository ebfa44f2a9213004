"""The names of raywb's series among Ray's metrics, what they mean, and their labels.

Names follow Prometheus' conventions: units in full, seconds and bytes; what is one thing with
several sides is one name with a label. Everything is a gauge, counts too: Ray's agent on a node
keeps the series of a counter for as long as the agent lives, whatever becomes of whom they count.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["METRICS", "Metric"]


class Metric(NamedTuple):
    """One name of series: without ``ray_``, which Ray puts in front of every name.

    Attributes:
        labels: names of its labels, in the order of :attr:`Sample.labels`.
    """

    name: str
    description: str
    labels: tuple[str, ...] = ()


def _table(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


_PIPELINE = ("run", "pipeline")
_PIPELINE_STAGE = ("run", "pipeline", "stage")
_STAGE = ("run", "stage")

#: Every name, in the order in which they are dealt with where there are too many series.
METRICS = _table(
    Metric(
        "raywb_run_info",
        "1 for each run; the labels say what it is, and where its page is.",
        ("run", "name", "project", "entity", "group", "mode", "url"),
    ),
    Metric("raywb_sink_state", "1 for the state that W&B's side is in.", ("run", "state")),
    Metric("raywb_sink_restarts", "How often W&B's side was started again.", ("run",)),
    Metric("raywb_rows_received", "Rows that the service has of the run.", ("run",)),
    Metric("raywb_rows_outbox", "Finished rows, numbered for W&B.", ("run",)),
    Metric("raywb_rows_applied", "Rows that W&B's client has taken.", ("run",)),
    Metric("raywb_rows_confirmed", "Rows that W&B has shown to have.", ("run",)),
    Metric("raywb_rows_backlog", "Finished rows that W&B does not have yet.", ("run",)),
    Metric("raywb_rows_lost", "Rows that could not be kept, over all sources.", ("reason",)),
    Metric("raywb_rows_after_finish", "Rows that belong to no run yet."),
    Metric("raywb_values_rejected", "Values that log() refused, over all sources."),
    Metric("raywb_updates_undelivered", "Tables, artifacts and alerts that W&B does not have."),
    Metric("raywb_sources", "Processes that log, by how they are.", ("state",)),
    Metric("raywb_nodes", "Nodes of the cluster, by how they are.", ("state",)),
    Metric("raywb_problems", "What is wrong at present, in the status' own words: how many."),
    Metric("raywb_warnings", "What is not as one would expect: how many."),
    Metric("raywb_service_starts", "How often the service was started."),
    Metric("raywb_keys", "Keys that the rows have.", ("state",)),
    Metric("raywb_series_exported", "Series of these names that Ray was given."),
    Metric("raywb_series_dropped", "Series beyond the limit, which Ray was not given."),
    Metric(
        "raywb_nodes_percent",
        "How busy the nodes are, all of them together.",
        ("resource", "statistic"),
    ),
    Metric(
        "raywb_pipeline_state", "1 for the state that the pipeline is in.", (*_PIPELINE, "state")
    ),
    Metric("raywb_pipeline_percent", "How much of the work is done.", _PIPELINE),
    Metric("raywb_pipeline_duration_seconds", "How long it has been running.", _PIPELINE),
    Metric("raywb_pipeline_inputs_left", "Inputs not yet taken in.", _PIPELINE),
    Metric("raywb_pipeline_outputs", "What has left the last stage.", _PIPELINE),
    Metric("raywb_pipeline_inputs_per_second", "Inputs worked off in a second.", _PIPELINE),
    Metric("raywb_pipeline_outputs_per_second", "Outputs made in a second.", _PIPELINE),
    Metric("raywb_pipeline_stage_bottleneck", "1 for the stage that holds it up.", _PIPELINE_STAGE),
    Metric(
        "raywb_pipeline_stage_tasks",
        "Tasks that came back, and those that are known.",
        (*_PIPELINE_STAGE, "state"),
    ),
    Metric(
        "raywb_pipeline_stage_queue",
        "Tasks in front of the stage, and results behind it.",
        (*_PIPELINE_STAGE, "side"),
    ),
    Metric(
        "raywb_pipeline_stage_slots",
        "Slots of its actors that hold a task, and that do not.",
        (*_PIPELINE_STAGE, "state"),
    ),
    Metric(
        "raywb_pipeline_stage_actors",
        "Actors that can work, and that are being set up.",
        (*_PIPELINE_STAGE, "state"),
    ),
    Metric(
        "raywb_pipeline_stage_actor_tasks_per_second",
        "Tasks that one actor works off in a second.",
        _PIPELINE_STAGE,
    ),
    Metric("raywb_pipeline_stage_cpu_percent", "CPU of all its actors.", _PIPELINE_STAGE),
    Metric("raywb_pipeline_stage_memory_bytes", "Memory of all its actors.", _PIPELINE_STAGE),
    Metric("raywb_stage_step", "The step of its newest row.", _STAGE),
    Metric("raywb_stage_steps_per_second", "Steps in a second, over the latest rows.", _STAGE),
    Metric("raywb_stage_last_row_timestamp_seconds", "When the newest row was logged.", _STAGE),
    Metric("raywb_stage_ranks", "Ranks of the stage, by how they are.", (*_STAGE, "state")),
    Metric("raywb_stage_slowest_rank", "The rank whose row came last.", _STAGE),
    Metric(
        "raywb_stage_rank_spread_seconds", "Time between the first rank's row and the last.", _STAGE
    ),
    Metric("raywb_node_percent", "How busy a node is.", ("node", "resource")),
    Metric("raywb_node_used_bytes", "What of a node's memory is used.", ("node", "resource")),
    Metric(
        "raywb_node_io_bytes_per_second",
        "What a node reads and writes, sends and receives.",
        ("node", "direction"),
    ),
    Metric("raywb_node_gpus_idle", "GPUs of a node that do next to nothing.", ("node",)),
    Metric("raywb_stage_value", "The newest value of what a stage logs.", (*_STAGE, "metric")),
)
