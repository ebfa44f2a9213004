"""What the dashboard shows: rows of panels, each with its queries, unit and explanation.

Every query takes the greatest value over the worker that a series comes from, so that a service
that was started again goes on with the same line, and filters by Ray's session and W&B's run.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ROWS", "Panel", "Query", "Row"]

#: Nodes whose lines are drawn: the busiest ones.
_DRAWN_NODES = 20


class Query(NamedTuple):
    """One query; ``legend`` names its lines by their labels."""

    expression: str
    legend: str


class Panel(NamedTuple):
    """One panel.

    Attributes:
        unit: Grafana's name of it.
        kind: Grafana's name of the panel's type.
        steps: from which value on which colour holds; the first from the least on.
        width: of 24 columns.
        repeat: the variable for each of whose values there is a panel.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    steps: tuple[tuple[float | None, str], ...] = ((None, "green"),)
    least: float | None = None
    most: float | None = None
    width: int = 12
    height: int = 8
    stacked: bool = False
    repeat: str | None = None


class Row(NamedTuple):
    """A row of panels that can be folded away."""

    title: str
    panels: tuple[Panel, ...]


def _series(name: str, by: str, matchers: str = "", *, of_run: bool = True) -> str:
    """The series of a name, whichever process it came from."""
    filters = ['SessionName=~"$SessionName"', *(['run=~"$run"'] if of_run else [])]
    return f"max by ({by}) (ray_raywb_{name}{{{', '.join([*filters, *filter(None, [matchers])])}}})"


def _rate(name: str, by: str, matchers: str = "") -> str:
    filters = ['SessionName=~"$SessionName"', 'run=~"$run"', *filter(None, [matchers])]
    return f"max by ({by}) (rate(ray_raywb_{name}{{{', '.join(filters)}}}[$__rate_interval]))"


def _whole(name: str, by: str, matchers: str = "") -> str:
    """Of what belongs to no run."""
    return _series(name, by, matchers, of_run=False)


_PIPELINE, _OF_PIPELINE = "run, pipeline", "{{pipeline}}"
_PART, _OF_PART = "run, pipeline, stage", "{{pipeline}} {{stage}}"
_STAGE, _OF_STAGE = "run, stage", "{{stage}}"
_GOOD_TO_BAD = ((None, "green"), (75.0, "yellow"), (90.0, "red"))

_PIPELINES = Row(
    "Pipelines",
    (
        Panel(
            "Progress",
            "How much of each pipeline's work is done. A pipeline's series end soon after it has.",
            "percent",
            (Query(_series("pipeline_percent", _PIPELINE), _OF_PIPELINE),),
            kind="bargauge",
            steps=((None, "blue"), (100.0, "green")),
            least=0,
            most=100,
            width=8,
        ),
        Panel(
            "Bottleneck",
            "The stage that holds its pipeline up, by its queue, its slots and its speed.",
            "none",
            (Query(_series("pipeline_stage_bottleneck", _PART), _OF_PART),),
            kind="state-timeline",
            steps=((None, "transparent"), (1.0, "orange")),
            least=0,
            most=1,
            width=8,
        ),
        Panel(
            "Inputs left and outputs",
            "Inputs not yet taken in, and what has left the last stage.",
            "short",
            (
                Query(_series("pipeline_inputs_left", _PIPELINE), f"{_OF_PIPELINE} inputs left"),
                Query(_series("pipeline_outputs", _PIPELINE), f"{_OF_PIPELINE} outputs"),
            ),
            least=0,
            width=8,
        ),
        Panel(
            "Throughput",
            "Inputs worked off and outputs made in a second, as the pipeline itself says.",
            "ops",
            (
                Query(_series("pipeline_inputs_per_second", _PIPELINE), f"{_OF_PIPELINE} inputs"),
                Query(_series("pipeline_outputs_per_second", _PIPELINE), f"{_OF_PIPELINE} outputs"),
            ),
            least=0,
        ),
        Panel(
            "Tasks done, by stage",
            "Tasks that came back from each stage in a second.",
            "ops",
            (Query(_rate("pipeline_stage_tasks", _PART, 'state="completed"'), _OF_PART),),
            least=0,
        ),
        Panel(
            "Queues",
            "Tasks that wait in front of a stage, and results that wait behind it.",
            "short",
            (Query(_series("pipeline_stage_queue", f"{_PART}, side"), f"{_OF_PART} {{{{side}}}}"),),
            least=0,
        ),
        Panel(
            "Slots in use",
            "The share of a stage's slots that hold a task. All in use, and a queue in front of "
            "it: it is the bottleneck. Few: it waits for the stage before it.",
            "percent",
            (
                Query(
                    "100 * "
                    + _series("pipeline_stage_slots", _PART, 'state="used"')
                    + f" / sum by ({_PART}) ("
                    + _series("pipeline_stage_slots", f"{_PART}, state")
                    + ")",
                    _OF_PART,
                ),
            ),
            least=0,
            most=100,
        ),
        Panel(
            "Actors",
            "Actors of each stage that can work, and that are being set up.",
            "short",
            (
                Query(
                    _series("pipeline_stage_actors", f"{_PART}, state"), f"{_OF_PART} {{{{state}}}}"
                ),
            ),
            least=0,
            width=8,
        ),
        Panel(
            "CPU, by stage",
            "What all actors of a stage use together; 100 % is one core.",
            "percent",
            (Query(_series("pipeline_stage_cpu_percent", _PART), _OF_PART),),
            least=0,
            width=8,
        ),
        Panel(
            "Memory, by stage",
            "What all actors of a stage use together.",
            "bytes",
            (Query(_series("pipeline_stage_memory_bytes", _PART), _OF_PART),),
            least=0,
            width=8,
            stacked=True,
        ),
    ),
)

_TRAINING = Row(
    "Training",
    (
        Panel(
            "Loss",
            "Whatever a stage logs that has loss in its name.",
            "none",
            (
                Query(
                    _series("stage_value", f"{_STAGE}, metric", 'metric=~"(?i).*loss.*"'),
                    f"{_OF_STAGE} {{{{metric}}}}",
                ),
            ),
        ),
        Panel(
            "$metric",
            "The newest value of what the stages log; chosen above.",
            "none",
            (Query(_series("stage_value", _STAGE, 'metric=~"$metric"'), _OF_STAGE),),
            repeat="metric",
        ),
        Panel(
            "Step",
            "The step of each stage's newest row. A line that stays flat has stopped.",
            "short",
            (Query(_series("stage_step", _STAGE), _OF_STAGE),),
            least=0,
            width=8,
        ),
        Panel(
            "Steps per second",
            "Over the latest rows of each stage.",
            "ops",
            (Query(_series("stage_steps_per_second", _STAGE), _OF_STAGE),),
            least=0,
            width=8,
        ),
        Panel(
            "Since the last row",
            "How long each stage has logged nothing.",
            "s",
            (Query(f"time() - {_series('stage_last_row_timestamp_seconds', _STAGE)}", _OF_STAGE),),
            kind="bargauge",
            steps=((None, "green"), (60.0, "yellow"), (300.0, "red")),
            least=0,
            width=8,
        ),
        Panel(
            "Ranks",
            "Ranks that there are to be, that have come, that have ended, and that lag.",
            "short",
            (Query(_series("stage_ranks", f"{_STAGE}, state"), f"{_OF_STAGE} {{{{state}}}}"),),
            least=0,
            width=8,
        ),
        Panel(
            "Spread of the ranks",
            "Time between the first rank's row and the last rank's, of each stage's newest step.",
            "s",
            (Query(_series("stage_rank_spread_seconds", _STAGE), _OF_STAGE),),
            least=0,
            width=8,
        ),
        Panel(
            "Slowest rank",
            "The rank whose row came last. Always the same one: it is the straggler.",
            "none",
            (Query(_series("stage_slowest_rank", _STAGE), _OF_STAGE),),
            least=0,
            width=8,
        ),
    ),
)


def _node_percent(resource: str) -> Query:
    busiest = _whole("node_percent", "node", f'resource="{resource}"')
    return Query(f"topk({_DRAWN_NODES}, {busiest})", "{{node}}")


_NODES = Row(
    "Nodes",
    (
        Panel(
            "Nodes",
            "Nodes that are part of the cluster, that have left it, and that did not answer.",
            "short",
            (Query(_whole("nodes", "state"), "{{state}}"),),
            kind="stat",
            width=6,
        ),
        Panel(
            "All nodes",
            "The mean over all nodes that have the value.",
            "percent",
            (
                Query(
                    _whole("nodes_percent", "resource", 'statistic="mean"'),
                    "{{resource}}",
                ),
            ),
            least=0,
            most=100,
            width=18,
        ),
        Panel(
            "CPU",
            f"Of each node; the {_DRAWN_NODES} busiest.",
            "percent",
            (_node_percent("cpu"),),
            steps=_GOOD_TO_BAD,
            least=0,
            most=100,
        ),
        Panel(
            "Memory",
            f"Of each node; the {_DRAWN_NODES} fullest. Ray ends work at 95 %.",
            "percent",
            (_node_percent("memory"),),
            steps=_GOOD_TO_BAD,
            least=0,
            most=100,
        ),
        Panel(
            "GPU",
            f"Of each node, the mean over its GPUs, and their memory; the {_DRAWN_NODES} busiest.",
            "percent",
            (
                _node_percent("gpu"),
                Query(_node_percent("gpu_memory").expression, "{{node}} memory"),
            ),
            least=0,
            most=100,
            width=8,
        ),
        Panel(
            "Disk and object store",
            f"How full they are on each node; the {_DRAWN_NODES} fullest.",
            "percent",
            (
                Query(_node_percent("disk").expression, "{{node}} disk"),
                Query(_node_percent("object_store").expression, "{{node}} object store"),
            ),
            steps=_GOOD_TO_BAD,
            least=0,
            most=100,
            width=8,
        ),
        Panel(
            "Network and disk traffic",
            f"What each node reads and writes, sends and receives; the {_DRAWN_NODES} greatest.",
            "Bps",
            (
                Query(
                    f"topk({_DRAWN_NODES}, "
                    + _whole("node_io_bytes_per_second", "node, direction")
                    + ")",
                    "{{node}} {{direction}}",
                ),
            ),
            least=0,
            width=8,
        ),
    ),
)

_DELIVERY = Row(
    "Delivery",
    (
        Panel(
            "Runs",
            "The runs that there are at present; the link leads to the page in W&B.",
            "none",
            (
                Query(
                    _series("run_info", "run, name, project, entity, group, mode, url"), "{{name}}"
                ),
            ),
            kind="table",
            width=16,
            height=6,
        ),
        Panel(
            "W&B's side",
            "The state that delivery to W&B is in: running, retrying, no key …",
            "none",
            (Query(_series("sink_state", "run, state"), "{{run}} {{state}}"),),
            kind="state-timeline",
            width=8,
            height=6,
        ),
        Panel(
            "Rows in and out",
            "Rows that came, and rows that W&B's client took and W&B has shown to have, in a "
            "second. Ranks' rows become one: less goes out than comes in.",
            "ops",
            (
                Query(_rate("rows_received", "run"), "{{run}} received"),
                Query(_rate("rows_applied", "run"), "{{run}} taken"),
                Query(_rate("rows_confirmed", "run"), "{{run}} confirmed"),
            ),
            least=0,
            width=8,
        ),
        Panel(
            "Backlog",
            "Finished rows that W&B does not have yet; they are safe on the head's disk.",
            "short",
            (Query(_series("rows_backlog", "run"), "{{run}}"),),
            steps=((None, "green"), (10_000.0, "yellow"), (1_000_000.0, "red")),
            least=0,
            width=8,
        ),
        Panel(
            "Lost",
            "Rows that could not be kept, by reason, and values that log() refused.",
            "short",
            (
                Query(_whole("rows_lost", "reason"), "{{reason}}"),
                Query(_whole("values_rejected", ""), "values rejected"),
                Query(_whole("updates_undelivered", ""), "updates not delivered"),
            ),
            steps=((None, "green"), (1.0, "red")),
            least=0,
            width=8,
        ),
        Panel(
            "Sources",
            "Processes that log: alive, silent, ended, killed, and those whose last rows may be "
            "missing.",
            "short",
            (Query(_whole("sources", "state"), "{{state}}"),),
            least=0,
            width=8,
        ),
        Panel(
            "Problems and warnings",
            "How many there are; `raywb status` says which.",
            "short",
            (
                Query(_whole("problems", ""), "problems"),
                Query(_whole("warnings", ""), "warnings"),
                Query(_whole("service_starts", ""), "starts of the service"),
                Query(_series("sink_restarts", "run"), "{{run}} restarts of W&B's side"),
            ),
            kind="stat",
            steps=((None, "green"), (1.0, "orange")),
            width=8,
        ),
        Panel(
            "Series",
            "Series of raywb in Ray's metrics, and those beyond the limit; keys in W&B.",
            "short",
            (
                Query(_whole("series_exported", ""), "in Ray's metrics"),
                Query(_whole("series_dropped", ""), "beyond the limit"),
                Query(_whole("keys", "state"), "keys {{state}}"),
            ),
            least=0,
            width=8,
        ),
    ),
)

ROWS = (_PIPELINES, _TRAINING, _NODES, _DELIVERY)
