"""What the newest rows of each run say: the outbox's items, folded as they are written.

Every item of the outbox passes through here once, in the service's loop, so a row costs next to
nothing: what a row with these keys says, and of which stage, is found out when keys in this
combination are first seen. After that a row is only remembered, until somebody asks.

Everything follows from the items in their order, so it is the same after a restart, and the same
for somebody who reads them from the outbox's files.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping

from raywb.live import Live, NodeUsage, PipelineProgress
from raywb.rows import Scalar
from raywb.service.live_pipeline import PIPELINE_KEYS, describe_pipeline
from raywb.service.live_stage import LiveStage, RowsAlike
from raywb.service.outbox import Item, OutDefine, OutRow
from raywb.service.stage_runs import FIRST_STAGE_RUN

__all__ = ["LiveRows"]

#: Series that are tracked, over all runs; of others the number is known, up to the second limit.
MAX_SERIES = 20_000
MAX_UNTRACKED_SERIES = 20_000

#: Stages, pipelines and nodes of one run that are tracked.
MAX_STAGES = 2_000
MAX_PIPELINES = 200
MAX_NODES = 512

#: Keys in all combinations that are remembered; beyond it they are found out anew.
MAX_REMEMBERED_KEYS = 100_000

#: A run that has got no row for this long makes room for the series of others, in seconds.
RESTING_S = 600.0

#: How many of each :meth:`LiveRows.live` names.
LISTED_STAGES = 100
LISTED_PIPELINES = 50

#: Keys of raywb's own, which are no stage's, and those of the nodes with the one in all of them.
_OWN = "raywb/"
_NODES = "nodes/"
_NODES_SIGN = "nodes/answered"

#: What stands in a node's place in keys about all of them.
_ALL_NODES = ("mean", "min", "max")


class _PipelineRows:
    """One pipeline, and its newest row."""

    __slots__ = ("name", "row")

    def __init__(self, name: str) -> None:
        self.name = name
        self.row: OutRow | None = None

    def take(self, row: OutRow) -> None:
        self.row = row

    def forget(self) -> None:
        """Nothing of it depends on the combination of keys."""

    def is_running(self, run: int) -> bool:
        described = self.describe(run)
        return described is not None and described.state == "running"

    def describe(self, run: int) -> PipelineProgress | None:
        if self.row is None:
            return None
        return describe_pipeline(self.name, run, self.row.metrics, self.row.time_s)


class _NodesRows:
    """Rows that tell of certain nodes."""

    __slots__ = ("names", "nodes")

    def __init__(self, nodes: _Nodes, names: list[str]) -> None:
        self.nodes = nodes
        self.names = names

    def take(self, row: OutRow) -> None:
        self.nodes.row = row
        for name in self.names:
            self.nodes.rows[name] = row

    def forget(self) -> None:
        """The nodes themselves know their rows."""


class _Nodes:
    """The newest row of all, and of each node the newest that tells of it."""

    __slots__ = ("row", "rows")

    def __init__(self) -> None:
        self.row: OutRow | None = None
        self.rows: dict[str, OutRow] = {}

    def describe(self) -> tuple[list[NodeUsage], dict[str, float]]:
        if self.row is None:
            return [], {}
        split: dict[int, tuple[dict[str, dict[str, float]], dict[str, float]]] = {}
        for row in (self.row, *self.rows.values()):
            if id(row) not in split:
                split[id(row)] = _split_nodes(row.metrics)
        now, of_all = split[id(self.row)]
        if not now:  # the cluster has become so large that rows hold means only
            return [], of_all
        usage = [
            NodeUsage(
                name=name,
                values=split[id(row)][0].get(name, {}),
                time_s=row.time_s,
                stale=name not in now,
            )
            for name, row in sorted(self.rows.items())
        ]
        return usage, of_all


class _Run:
    """What is known of one run."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, ...], list[_PipelineRows | _NodesRows | RowsAlike]] = {}
        self.keys: set[str] = set()
        self.untracked: set[int] = set()
        #: The axis of each namespace that has one, as it was defined.
        self.axes: dict[str, str] = {}
        self.stages: dict[str, LiveStage] = {}
        self.pipelines: dict[str, _PipelineRows] = {}
        self.nodes = _Nodes()

    @property
    def time_s(self) -> float:
        """When its newest row was logged."""
        rows = [self.nodes.row, *(one.row for one in self.pipelines.values())]
        rows += [stage.row for stage in self.stages.values()]
        return max((row.time_s for row in rows if row is not None), default=0.0)

    def forget_combinations(self) -> None:
        """Find out anew what each combination of keys says; what rows said stays."""
        for parts in self.known.values():
            for part in parts:
                part.forget()
        self.known.clear()


class LiveRows:
    """Folds items of the outbox to what views show."""

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}
        self._series = 0
        self._remembered_keys = 0

    def take(self, item: Item) -> None:
        """Take one item in, in the order of the outbox."""
        if type(item) is OutRow:
            run = self._runs.get(item.run)
            parts = run.known.get(tuple(item.metrics)) if run is not None else None
            for part in self._learn(item) if parts is None else parts:
                part.take(item)
        elif type(item) is OutDefine and item.step_metric and item.name.endswith("/*"):
            self._define(self._run(item.run), item.name[:-2], item.step_metric)

    def live(self, runs: Iterable[int] | None = None) -> Live:
        """What the newest rows say.

        Args:
            runs: numbers of the runs that are asked for; all of them where it is None. Nodes are
                those of the latest of them that tells of any.
        """
        numbers = list(self._runs if runs is None else runs)
        chosen = {number: self._runs[number] for number in numbers if number in self._runs}
        pipelines = [
            described
            for number, run in chosen.items()
            for one in run.pipelines.values()
            if (described := one.describe(number)) is not None
        ]
        running = [one for one in pipelines if one.state == "running"]
        ended = [one for one in pipelines if one.state != "running"]
        listed = [*running, *sorted(ended, key=lambda one: -one.time_s)]
        stages = [
            (stage.row.time_s, number, stage)
            for number, run in chosen.items()
            for stage in run.stages.values()
            if stage.row is not None
        ]
        stages.sort(key=lambda one: -one[0])
        with_nodes = [number for number, run in chosen.items() if run.nodes.row is not None]
        nodes, all_nodes = chosen[max(with_nodes)].nodes.describe() if with_nodes else ([], {})
        untracked = sum(len(run.untracked) for run in chosen.values())
        return Live(
            pipelines=listed[:LISTED_PIPELINES],
            stages=[stage.describe(number) for _, number, stage in stages[:LISTED_STAGES]],
            nodes=nodes,
            all_nodes=all_nodes,
            series=sum(len(run.keys) for run in chosen.values()) + untracked,
            untracked_series=untracked,
            more_pipelines=max(len(listed) - LISTED_PIPELINES, 0),
            more_stages=max(len(stages) - LISTED_STAGES, 0),
        )

    def _run(self, number: int) -> _Run:
        return self._runs.setdefault(number, _Run())

    def _define(self, run: _Run, namespace: str, axis: str) -> None:
        if run.axes.get(namespace) == axis or len(run.axes) >= MAX_SERIES:
            return
        run.axes[namespace] = axis
        run.forget_combinations()
        self._drop_within(run, namespace)

    def _drop_within(self, run: _Run, namespace: str) -> None:
        """What was taken for a stage lies within one: it was a part of that one's keys."""
        inner = [name for name in run.stages if name.startswith(namespace + "/")]
        if inner := [name for name in inner if name not in run.axes]:
            run.forget_combinations()
            for name in inner:
                del run.stages[name]

    def _learn(self, row: OutRow) -> list[_PipelineRows | _NodesRows | RowsAlike]:
        """Find out what rows with these keys tell of."""
        run = self._run(row.run)
        keys = tuple(row.metrics)
        self._remembered_keys += len(keys) + 1
        if self._remembered_keys > MAX_REMEMBERED_KEYS:
            for other in self._runs.values():
                other.forget_combinations()
            self._remembered_keys = len(keys) + 1
        self._admit(run, row)
        parts: list[_PipelineRows | _NodesRows | RowsAlike] = []
        rest = [key for key in keys if not key.startswith(_OWN)]
        if _NODES_SIGN in row.metrics:
            told = [key for key in rest if key.startswith(_NODES)]
            parts.append(self._nodes_rows(run, row))
            rest = [key for key in rest if key not in set(told)]
        for namespace in _pipelines_in(rest, row.metrics):
            prefix = namespace + "/" if namespace else ""
            parts.append(self._pipeline_rows(row.run, run, namespace))
            rest = [key for key in rest if not key.startswith(prefix)]
        for namespace, found in sorted(self._namespaces(run, rest).items()):
            if (alike := self._stage_rows(run, namespace, found, row)) is not None:
                parts.append(alike)
        run.known[keys] = parts
        return parts

    def _admit(self, run: _Run, row: OutRow) -> None:
        """Count the series that are new, and track them while there is room."""
        fresh = [key for key in row.metrics if key not in run.keys]
        if self._series + len(fresh) > MAX_SERIES:
            self._make_room(row)
        for key in fresh:
            if self._series < MAX_SERIES:
                run.keys.add(key)
                run.untracked.discard(zlib.crc32(key.encode()))
                self._series += 1
            elif len(run.untracked) < MAX_UNTRACKED_SERIES:
                run.untracked.add(zlib.crc32(key.encode()))

    def _make_room(self, row: OutRow) -> None:
        """Forget runs that rest, the one that does for longest first; by the rows' own time.

        The cluster's runs follow one another, so all but the latest rest.
        """
        latest = max((n for n in (*self._runs, row.run) if n < FIRST_STAGE_RUN), default=0)
        times_s = {number: run.time_s for number, run in self._runs.items() if number != row.run}
        resting = [
            number
            for number, time_s in times_s.items()
            if number < latest or time_s < row.time_s - RESTING_S
        ]
        for number in sorted(resting, key=times_s.__getitem__):
            if self._series + len(row.metrics) <= MAX_SERIES:
                return
            self._series -= len(self._runs.pop(number).keys)

    def _nodes_rows(self, run: _Run, row: OutRow) -> _NodesRows:
        names = list(_split_nodes(row.metrics)[0])
        nodes = run.nodes
        surplus = len(nodes.rows.keys() | set(names)) - MAX_NODES
        if surplus > 0:
            gone = [name for name in nodes.rows if name not in set(names)]
            gone.sort(key=lambda name: nodes.rows[name].time_s)
            for name in gone[:surplus]:
                del nodes.rows[name]
        return _NodesRows(nodes, names)

    def _pipeline_rows(self, number: int, run: _Run, namespace: str) -> _PipelineRows:
        found = run.pipelines.get(namespace)
        if found is None:
            if len(run.pipelines) >= MAX_PIPELINES:
                # The first that has ended; rows of it would begin it anew.
                ended = (one for one in run.pipelines.values() if not one.is_running(number))
                oldest = next(ended, next(iter(run.pipelines.values())))
                del run.pipelines[oldest.name]
                run.forget_combinations()
            found = run.pipelines[namespace] = _PipelineRows(namespace)
        return found

    def _stage_rows(
        self, run: _Run, namespace: str, keys: list[str], row: OutRow
    ) -> RowsAlike | None:
        stage = run.stages.get(namespace)
        tracked = [key for key in keys if key in run.keys]
        if stage is None:
            if len(run.stages) >= MAX_STAGES or not tracked:
                return None
            if namespace:
                self._drop_within(run, namespace)
            stage = run.stages[namespace] = LiveStage(namespace)
        stage.axis = run.axes.get(namespace, stage.axis)
        return stage.rows_alike(tracked, row)

    def _namespaces(self, run: _Run, keys: list[str]) -> dict[str, list[str]]:
        """Which stage each key of a row belongs to.

        A namespace with an axis of its own is a stage. Where there is none, it is what all keys
        of the row have in common; and where they have nothing in common, each key's own.
        """
        found: dict[str, list[str]] = {}
        rest = []
        for key in keys:
            namespace = _within(key, run.axes)
            if namespace is None:
                rest.append(key)
            else:
                found.setdefault(namespace, []).append(key)
        common = _common_namespace(rest)
        for key in rest:
            # What is known already, with this key in it, is the wider one.
            own = common or key.rpartition("/")[0]
            namespace = _within(own + "/", run.stages) if own else ""
            found.setdefault(own if namespace is None else namespace, []).append(key)
        return found


def _common_namespace(keys: list[str]) -> str:
    """What all keys have before their last slash at the least; empty where they differ."""
    if not keys:
        return ""
    lowest, highest = (key.split("/")[:-1] for key in (min(keys), max(keys)))
    shared = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(lowest, highest, strict=False)
    )
    return "/".join(part for part, _ in shared)


def _within(key: str, namespaces: Mapping[str, object]) -> str | None:
    """The longest of the namespaces that a key lies in."""
    while key:
        key = key.rpartition("/")[0]
        if key and key in namespaces:
            return key
    return None


def _pipelines_in(keys: list[str], metrics: dict[str, Scalar]) -> list[str]:
    """The namespaces of the pipelines that a row tells of."""
    axis, *others = PIPELINE_KEYS
    prefixes = [key.removesuffix(axis) for key in keys if key.endswith(axis)]
    return [
        prefix.removesuffix("/")
        for prefix in prefixes
        if prefix[-1:] in ("", "/") and all(prefix + other in metrics for other in others)
    ]


def _split_nodes(
    metrics: dict[str, Scalar],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What a row of the nodes says of each, and of all together."""
    by_name: dict[str, dict[str, float]] = {}
    of_all: dict[str, float] = {}
    for key, value in metrics.items():
        if not key.startswith(_NODES) or isinstance(value, (str, bool)):
            continue
        name, slash, rest = key[len(_NODES) :].partition("/")
        if slash and name not in _ALL_NODES:
            by_name.setdefault(name, {})[rest] = value
        else:
            of_all[key[len(_NODES) :]] = value
    return by_name, of_all
