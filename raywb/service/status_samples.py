"""The service's status as samples of the series that ``series_names`` lists.

Series about a run carry its W&B id as the label ``run``: one pipeline or stage belongs to one run,
so the label makes no more series than there are, and parts those of runs one after the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from raywb.live import Live, NodeUsage, PipelineProgress, PipelineStageProgress, StageProgress
from raywb.reports import RunInfo, SinkStatus, Status

__all__ = ["NodeReadings", "Sample", "Subject", "is_over", "subjects_of"]

#: A stage of which nothing was heard for this long is over, in seconds, even where nobody said so.
SILENT_S = 3600.0

#: The same of a pipeline. It gives a snapshot every 30 or 60 s unless it is told otherwise; one
#: that gives them at longer intervals than this is shown for so long after each of them.
PIPELINE_SILENT_S = 600.0

#: A reading of the nodes says how they are for so many of the intervals between readings, and for
#: so many seconds at the least.
READING_INTERVALS = 4
SHORTEST_READING_S = 60.0

_BYTES_PER_GB = 2.0**30
_BYTES_PER_MB = 1e6


class Sample(NamedTuple):
    """The value of one series; labels are as the user wrote them, not cleaned."""

    name: str
    labels: tuple[str, ...]
    value: float


class Subject(NamedTuple):
    """What begins and ends as a whole: the run's delivery, a pipeline, a stage, a node.

    Attributes:
        key: who it is.
        time_s: its newest row, in seconds since the epoch.
        ended: it is over; what it has is its last state.
        samples: its series.
    """

    key: tuple[str, ...]
    time_s: float
    ended: bool
    samples: list[Sample]


class NodeReadings:
    """Knows how long the latest reading of the nodes says how they are.

    How often they are read is a setting of the run, and more seldom on large clusters: it shows
    in the time from one reading to the next.
    """

    def __init__(self) -> None:
        self._mark: float | None = None
        self._time_s = -math.inf
        self._interval_s = 0.0

    def take(self, live: Live, now_s: float) -> None:
        """Look for a later reading than the one before.

        Args:
            live: what rows say now.
            now_s: the present, in seconds since the epoch.
        """
        newest_s = max((node.time_s for node in live.nodes), default=None)
        # Rows that hold means only say on their axis alone that they are other ones.
        mark = live.all_nodes.get("time_s") if newest_s is None else newest_s
        if mark is None or mark == self._mark:
            return
        time_s = now_s if newest_s is None else newest_s
        if self._mark is not None:
            self._interval_s = max(time_s - self._time_s, 0.0)
        self._mark, self._time_s = mark, time_s

    def is_old(self, now_s: float, time_s: float | None = None) -> bool:
        """Whether it says nothing any more.

        Args:
            now_s: the present, in seconds since the epoch.
            time_s: when a node was read; the latest reading of any where it is None.
        """
        longest_s = max(SHORTEST_READING_S, READING_INTERVALS * self._interval_s)
        return now_s - (self._time_s if time_s is None else time_s) > longest_s


def is_over(status: Status) -> bool:
    """Nothing is at work: the run was ended, or nobody has it any more, and its sink rests."""
    return status.finished or status.sink.state == "resting"


def subjects_of(status: Status, now_s: float, readings: NodeReadings) -> list[Subject]:
    """All that the status says in numbers.

    Args:
        status: the service at one moment.
        now_s: the present, in seconds since the epoch.
        readings: it has taken this status' nodes.
    """
    over = is_over(status)
    runs = {one.run.epoch: one.run for one in status.stage_runs} | {status.run.epoch: status.run}
    ended_runs = {one.run.epoch for one in status.stage_runs if one.state != "running"}
    is_at_work = _stages_at_work(status)

    def labels_of(number: int, name: str) -> tuple[str, str]:
        """The run's id, and the name; a stage whose run is its own has none among the keys."""
        run = runs.get(number)
        if run is None:
            return str(number), name
        return run.id, name or run.job_type or run.name

    def has_ended(number: int, name: str, time_s: float, silent_s: float) -> bool:
        late = now_s - time_s > silent_s
        return over or late or number in ended_runs or not is_at_work(name)

    nodes, stale = _nodes_that_answer(status, now_s, readings)
    service = list(_service(status, stale))
    if not readings.is_old(now_s):
        service += _all_nodes(status)
    found = [Subject(("service",), now_s, over, service)]
    found += _runs(status, now_s, over)
    for pipeline in status.live.pipelines:
        labels = labels_of(pipeline.run, pipeline.name)
        ended = pipeline.state != "running" or has_ended(
            pipeline.run, labels[1], pipeline.time_s, PIPELINE_SILENT_S
        )
        samples = list(_pipeline(pipeline, labels))
        found.append(Subject(("pipeline", *labels), pipeline.time_s, ended, samples))
    for stage in status.live.stages:
        labels = labels_of(stage.run, stage.stage)
        ended = has_ended(stage.run, labels[1], stage.time_s, SILENT_S)
        samples = list(_stage(stage, labels))
        found.append(Subject(("stage", *labels), stage.time_s, ended, samples))
    found += _ranks(status, now_s, over, is_at_work)
    for node in nodes:
        samples = list(_node(node.name, node.values.items()))
        found.append(Subject(("node", node.name), node.time_s, over, samples))
    return found


def _stages_at_work(status: Status) -> Callable[[str], bool]:
    """Tells of a stage or a pipeline whether anybody can still log to it.

    That is one of the sources of this stage, or of the one that it is a part of; of a stage that
    no source is attached for, and so of most pipelines, any source.
    """
    known: set[str] = set()
    at_work: set[str] = set()
    for source in status.sources:
        known.update(source.stages)
        if not source.ended:
            at_work.update(source.stages)
    anybody = any(not source.ended for source in status.sources)

    def is_at_work(stage: str) -> bool:
        while stage:
            if stage in known:
                return stage in at_work
            stage = stage.rpartition("/")[0]
        return anybody

    return is_at_work


def _service(status: Status, stale_nodes: int) -> Iterator[Sample]:
    for reason, count in sorted(status.lost.items()):
        yield Sample("raywb_rows_lost", (reason,), count)
    yield Sample("raywb_rows_after_finish", (), status.after_finish_rows)
    yield Sample("raywb_values_rejected", (), status.rejected)
    yield Sample("raywb_updates_undelivered", (), len(status.undelivered_updates))
    states = Counter({"live": 0, "silent": 0, "ended": 0, "killed": 0})
    for source in status.sources:
        ended = "killed" if source.killed else "ended"
        heard = source.heard_ago_s is not None and source.heard_ago_s <= status.silence_s
        states[ended if source.ended else "live" if heard else "silent"] += 1
    states["unconfirmed"] = len(status.unconfirmed)
    yield from _by_label("raywb_sources", (), states)
    left = sum(node.left_s is not None for node in status.nodes)
    nodes = {"alive": len(status.nodes) - left, "left": left, "stale": stale_nodes}
    yield from _by_label("raywb_nodes", (), nodes)
    yield Sample("raywb_problems", (), len(status.problems))
    yield Sample("raywb_warnings", (), len(status.warnings))
    yield Sample("raywb_service_starts", (), status.incarnation)
    untracked = status.live.untracked_series
    keys = {"tracked": status.live.series - untracked, "untracked": untracked}
    yield from _by_label("raywb_keys", (), keys)


def _all_nodes(status: Status) -> Iterator[Sample]:
    for key, value in status.live.all_nodes.items():
        statistic, _, resource = key.partition("/")
        if resource.endswith("_percent"):
            labels = (resource.removesuffix("_percent"), statistic)
            yield Sample("raywb_nodes_percent", labels, value)


def _by_label(name: str, labels: tuple[str, ...], counts: Mapping[str, float]) -> Iterator[Sample]:
    for label, count in counts.items():
        yield Sample(name, (*labels, label), count)


def _runs(status: Status, now_s: float, over: bool) -> Iterator[Subject]:
    """The cluster's run, and those that stages have of their own."""
    rows = {"received": status.received_rows, "backlog": status.backlog_rows}
    rows["outbox"] = status.outbox_rows
    samples = list(_run(status.run, status.sink, rows))
    yield Subject(("run", status.run.id), now_s, over, samples)
    for one in status.stage_runs:
        rows = {"received": one.received_rows, "backlog": one.backlog_rows}
        samples = list(_run(one.run, one.sink, rows))
        # One that ended long ago is still in the list, so nothing says how new it is.
        yield Subject(("run", one.run.id), 0.0, over or one.state != "running", samples)


def _run(info: RunInfo, sink: SinkStatus, rows: dict[str, int]) -> Iterator[Sample]:
    rows = {**rows, "applied": sink.applied_rows, "confirmed": sink.confirmed_rows}
    group, entity, url = info.group or "", info.entity or "", info.url or ""
    what = (info.name, info.project, entity, group, info.mode, url)
    yield Sample("raywb_run_info", (info.id, *what), 1)
    yield Sample("raywb_sink_state", (info.id, sink.state), 1)
    yield Sample("raywb_sink_restarts", (info.id,), sink.restarts)
    for name, count in rows.items():
        yield Sample(f"raywb_rows_{name}", (info.id,), count)


def _pipeline(one: PipelineProgress, labels: tuple[str, ...]) -> Iterator[Sample]:
    yield Sample("raywb_pipeline_state", (*labels, one.state), 1)
    yield from _known(
        "raywb_pipeline_",
        labels,
        {
            "percent": one.percent,
            "duration_seconds": one.duration_s,
            "inputs_left": one.inputs_left,
            "outputs": one.outputs,
            "inputs_per_second": one.inputs_per_s,
            "outputs_per_second": one.outputs_per_s,
        },
    )
    for stage in one.stages:
        yield from _pipeline_stage(stage, (*labels, stage.name))


def _pipeline_stage(stage: PipelineStageProgress, labels: tuple[str, ...]) -> Iterator[Sample]:
    prefix = "raywb_pipeline_stage_"
    yield Sample(f"{prefix}bottleneck", labels, stage.is_bottleneck)
    tasks = {"completed": stage.tasks_completed, "known": stage.tasks_known}
    yield from _by_label(f"{prefix}tasks", labels, tasks)
    queue = {"in": stage.queue_in, "out": stage.queue_out}
    yield from _by_label(f"{prefix}queue", labels, queue)
    slots = {"used": stage.slots_used, "empty": stage.slots_empty}
    yield from _by_label(f"{prefix}slots", labels, slots)
    actors = {"ready": stage.actors_ready, "pending": stage.actors_pending}
    yield from _by_label(f"{prefix}actors", labels, actors)
    memory_gb = stage.memory_gb
    yield from _known(
        prefix,
        labels,
        {
            "actor_tasks_per_second": stage.speed_tasks_per_s,
            "cpu_percent": stage.cpu_percent,
            "memory_bytes": None if memory_gb is None else memory_gb * _BYTES_PER_GB,
        },
    )


def _known(
    prefix: str, labels: tuple[str, ...], values: Mapping[str, float | None]
) -> Iterator[Sample]:
    """Those that are known; what is no number is no value of a series either."""
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            yield Sample(prefix + name, labels, value)


def _stage(one: StageProgress, labels: tuple[str, ...]) -> Iterator[Sample]:
    yield from _known(
        "raywb_stage_",
        labels,
        {
            "step": one.step,
            "steps_per_second": one.steps_per_s,
            "last_row_timestamp_seconds": one.time_s,
            "slowest_rank": one.slowest_rank,
            "rank_spread_seconds": one.rank_spread_s,
        },
    )
    for metric, value in one.metrics.items():
        if math.isfinite(value):
            yield Sample("raywb_stage_value", (*labels, metric), value)


def _ranks(
    status: Status, now_s: float, over: bool, is_at_work: Callable[[str], bool]
) -> Iterator[Subject]:
    for one in status.stages:
        ranks = {"expected": one.world_size, "attached": one.attached, "ended": one.ended}
        ranks["slow"] = one.slow_ranks
        samples = list(_by_label("raywb_stage_ranks", (one.run_id, one.stage), ranks))
        ended = over or not is_at_work(one.stage)
        newest_s = now_s - (one.last_row_s or 0.0)
        yield Subject(("ranks", one.run_id, one.stage), newest_s, ended, samples)


#: What a row says of a node, and the series that it becomes: its name, its last label, its unit.
_NODE_SERIES = {
    "memory_used_gb": ("raywb_node_used_bytes", "memory", _BYTES_PER_GB),
    "gpu_memory_used_gb": ("raywb_node_used_bytes", "gpu_memory", _BYTES_PER_GB),
    "object_store_used_gb": ("raywb_node_used_bytes", "object_store", _BYTES_PER_GB),
    "disk_read_mb_per_s": ("raywb_node_io_bytes_per_second", "disk_read", _BYTES_PER_MB),
    "disk_write_mb_per_s": ("raywb_node_io_bytes_per_second", "disk_write", _BYTES_PER_MB),
    "network_sent_mb_per_s": ("raywb_node_io_bytes_per_second", "network_sent", _BYTES_PER_MB),
    "network_received_mb_per_s": (
        "raywb_node_io_bytes_per_second",
        "network_received",
        _BYTES_PER_MB,
    ),
}


def _nodes_that_answer(
    status: Status, now_s: float, readings: NodeReadings
) -> tuple[list[NodeUsage], int]:
    """Nodes that are there and answer, and how many are there and do not.

    Of these, and of those that have left, there is no last state that anybody wants.
    """
    alive = {node.name for node in status.nodes if node.left_s is None}
    there = [node for node in status.live.nodes if node.name in alive]
    found = [node for node in there if not node.stale and not readings.is_old(now_s, node.time_s)]
    return found, len(there) - len(found)


def _node(name: str, values: Iterable[tuple[str, float]]) -> Iterator[Sample]:
    for key, value in values:
        if not math.isfinite(value):
            continue
        if key in _NODE_SERIES:
            series, label, unit = _NODE_SERIES[key]
            yield Sample(series, (name, label), value * unit)
        elif key == "gpus_idle":
            yield Sample("raywb_node_gpus_idle", (name,), value)
        elif key.endswith("_percent"):
            yield Sample("raywb_node_percent", (name, key.removesuffix("_percent")), value)
