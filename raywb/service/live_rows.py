"""What the newest rows of each run say: the outbox's items, folded as they are written.

Every item of the outbox passes through here once, in the service's loop, so a row costs next to
nothing: what a row with these keys says, and of which stage, is found out when keys in this
combination are first seen. After that a row is only remembered, until somebody asks.

Everything follows from the items in their order, so it is the same after a restart, and the same
for somebody who reads them from the outbox's files. Nothing in here stops whoever feeds it: what
fails is left out, and counted.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from raywb.live import Live, NodeUsage
from raywb.rows import Scalar
from raywb.service.live_nodes import NODES, NODES_SIGN, NodesRows
from raywb.service.live_pipeline import PIPELINE_KEYS, LivePipeline
from raywb.service.live_run import LiveRun, Part
from raywb.service.live_stage import LISTED_METRICS, LiveStage
from raywb.service.outbox import Item, OutDefine, OutRow
from raywb.service.stage_runs import FIRST_STAGE_RUN

__all__ = ["LiveRows"]

#: Keys of stages that are tracked, over all runs; of others only the number is known, up to the
#: second limit.
MAX_SERIES = 20_000
MAX_UNTRACKED_SERIES = 20_000

#: Stages and pipelines of all runs that are tracked, and runs whose nodes are.
MAX_STAGES = 2_000
MAX_PIPELINES = 200
MAX_RUNS_WITH_NODES = 8

#: Keys in all combinations that are remembered; beyond it they are found out anew.
MAX_REMEMBERED_KEYS = 100_000

#: A stage makes room for others when it has got no row for this long, in seconds, or while so many
#: came of others: time alone is not to be trusted, since users set it.
QUIET_S = 60.0
QUIET_ROWS = 100

#: How many of each :meth:`LiveRows.live` names.
LISTED_STAGES = 100
LISTED_PIPELINES = 50

#: Keys of raywb's own, which are no stage's.
_OWN = "raywb/"

_T = TypeVar("_T")


class LiveRows:
    """Folds items of the outbox to what views show.

    Attributes:
        failures: how often something could not be taken in or shown.
        problem: what failed the last time.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.problem: str | None = None
        self._runs: dict[int, LiveRun] = {}
        self._ticks = itertools.count()
        self._series = 0
        self._remembered_keys = 0
        #: Without room, it is looked for again at this row.
        self._look_again = 0

    def take(self, item: Item) -> None:
        """Take one item in, in the order of the outbox; nothing is raised."""
        try:
            if type(item) is OutRow:
                run = self._runs.get(item.run)
                parts = run.known.get(tuple(item.metrics)) if run is not None else None
                for part in self._learn(item) if parts is None else parts:
                    part.take(item)
            elif type(item) is OutDefine and item.step_metric:
                self._run(item.run).define(item.name, item.step_metric)
        except Exception as error:  # noqa: BLE001 - a view stops nobody; it is counted
            self._note(error)
            if type(item) is OutRow and (run := self._runs.get(item.run)) is not None:
                run.known.pop(tuple(item.metrics), None)

    def _note(self, error: Exception) -> None:
        self.failures += 1
        self.problem = f"{type(error).__name__}: {error}"[:200]

    def _try(self, describe: Callable[[], _T]) -> _T | None:
        try:
            return describe()
        except Exception as error:  # noqa: BLE001 - a view stops nobody; it is counted
            self._note(error)
            return None

    def live(
        self,
        runs: Iterable[int] | None = None,
        *,
        now_s: float | None = None,
        nodes_stale_s: float = math.inf,
    ) -> Live:
        """What the newest rows say.

        Args:
            runs: numbers of the runs that are asked for; all of them where it is None. Nodes are
                those of the latest of them that tells of any.
            now_s: the present, while nodes are read; None where nobody does.
            nodes_stale_s: nodes of which a row said so much earlier are stale.
        """
        numbers = list(self._runs if runs is None else runs)
        chosen = {number: self._runs[number] for number in numbers if number in self._runs}
        found = [(one.seen, n, one) for n, run in chosen.items() for one in run.pipelines.values()]
        found.sort(key=lambda one: -one[0])
        described = [self._try(lambda n=n, one=one: one.describe(n)) for _, n, one in found]  # type: ignore[misc]
        known = [one for one in described if one is not None]
        pipelines = sorted(known, key=lambda one: one.state != "running")
        stages = [
            (stage.seen, number, stage)
            for number, run in chosen.items()
            for stage in run.stages.values()
            if stage.row is not None
        ]
        stages.sort(key=lambda one: -one[0])
        listed = [
            self._try(lambda n=number, stage=stage: stage.describe(n))  # type: ignore[misc]
            for _, number, stage in stages[:LISTED_STAGES]
        ]
        nodes: list[NodeUsage] = []
        all_nodes: dict[str, float] = {}
        if with_nodes := [number for number, run in chosen.items() if run.nodes.row is not None]:
            latest = chosen[max(with_nodes)].nodes
            nodes, all_nodes = self._try(lambda: latest.describe(now_s, nodes_stale_s)) or ([], {})
        untracked = sum(len(run.untracked) for run in chosen.values())
        shown = sum(len(run.keys) + len(run.shown) for run in chosen.values())
        dropped = sum(len(run.dropped) for run in chosen.values())
        return Live(
            pipelines=pipelines[:LISTED_PIPELINES],
            stages=[one for one in listed if one is not None],
            nodes=nodes,
            all_nodes=all_nodes,
            series=shown + untracked,
            untracked_series=untracked,
            more_pipelines=max(len(pipelines) - LISTED_PIPELINES, 0),
            more_stages=max(len(stages) - LISTED_STAGES, 0) + dropped,
            dropped_stages=dropped,
        )

    def nodes_alive(self, runs: Iterable[int]) -> int:
        """How many nodes there were, as the newest row of any of these runs says; 0 if none."""
        found = [run.nodes.alive for number in runs if (run := self._runs.get(number)) is not None]
        return max(found, default=0)

    def _run(self, number: int) -> LiveRun:
        run = self._runs.get(number)
        if run is None:
            run = self._runs[number] = LiveRun(self._ticks)
        return run

    def _learn(self, row: OutRow) -> list[Part]:
        """Find out what rows with these keys tell of.

        What there is to forget is forgotten before the first part of this row is made: parts
        that were made belong to what they were made for.
        """
        run = self._run(row.run)
        keys = tuple(row.metrics)
        self._remember(len(keys) + 1)
        rest = [key for key in keys if not key.startswith(_OWN)]
        if has_nodes := NODES_SIGN in row.metrics:
            rest = [key for key in rest if not key.startswith(NODES)]
        pipelines = _pipelines_in(rest, row.metrics)
        if pipelines:
            prefixes = tuple(name + "/" if name else "" for name in pipelines)
            rest = [key for key in rest if not key.startswith(prefixes)]
        found = run.namespaces(rest)
        self._make_room(run, row, found)
        tracked = self._admit(run, found, keys)
        if begun := self._to_begin(run, found, tracked):
            run.begin(begun)
        if begun_pipelines := [name for name in pipelines if name not in run.pipelines]:
            self._begin_pipelines(run, begun_pipelines)

        parts: list[Part] = []
        if has_nodes:
            self._drop_nodes()
            run.note_nodes(keys)
            parts.append(NodesRows(run.nodes, row))
        parts += [run.pipelines[name] for name in pipelines if name in run.pipelines]
        whole = True
        for namespace, own in found.items():
            stage = run.stages.get(namespace)
            if stage is not None:
                run.dropped.discard(_hash(namespace))
                parts.append(stage.rows_alike([key for key in own if key in run.keys], row))
            else:
                whole = False
                _count(run.dropped, namespace)
        if whole:  # for the others room may be found later
            run.known[keys] = parts
        return parts

    def _remember(self, keys: int) -> None:
        """So many keys more are to be remembered; beyond the limit all others are forgotten."""
        self._remembered_keys += keys
        if self._remembered_keys > MAX_REMEMBERED_KEYS:
            for other in self._runs.values():
                other.forget_combinations()
            self._remembered_keys = keys

    def _to_begin(self, run: LiveRun, found: dict[str, list[str]], tracked: set[str]) -> list[str]:
        room = MAX_STAGES - sum(len(other.stages) for other in self._runs.values())
        begun = [
            name
            for name, keys in found.items()
            if name not in run.stages and any(key in tracked for key in keys)
        ]
        for name in begun[room:]:
            self._release(run, [key for key in found[name] if key in run.keys])
        return begun[:room]

    def _admit(self, run: LiveRun, found: dict[str, list[str]], keys: Collection[str]) -> set[str]:
        """Count the series that are new, and track those of stages while there is room.

        Returns:
            Those keys that are tracked.
        """
        of_stages: list[list[str]] = [[], []]
        for namespace, own in found.items():
            stage = run.stages.get(namespace)
            room = LISTED_METRICS - (stage.key_count if stage is not None else 0)
            fresh = [key for key in own if key not in run.keys]
            of_stages[0] += fresh[: max(room, 0)]
            of_stages[1] += fresh[max(room, 0) :]
        for key in itertools.chain(*of_stages):
            if self._series < MAX_SERIES:
                run.keys.add(key)
                run.untracked.discard(_hash(key))
                self._series += 1
            else:
                _count(run.untracked, key)
        owned = {key for own in found.values() for key in own}
        for key in keys:
            if key not in owned:
                _count(run.shown, key)
        return owned & run.keys

    def _release(self, run: LiveRun, keys: Iterable[str]) -> None:
        """Track these keys no longer."""
        for key in keys:
            if key in run.keys:
                run.keys.remove(key)
                _count(run.untracked, key)
                self._series -= 1

    def _make_room(self, run: LiveRun, row: OutRow, found: dict[str, list[str]]) -> None:
        """For the stages of a row: wide ones give up what nobody is shown, silent ones all."""
        begun = sum(name not in run.stages for name in found)
        stages = sum(len(other.stages) for other in self._runs.values())
        surplus = stages + begun - MAX_STAGES
        wanted = 0
        for name, own in found.items():
            known = run.stages.get(name)
            room = LISTED_METRICS - (known.key_count if known is not None else 0)
            if room > 0:
                wanted += min(room, sum(key not in run.keys for key in own))
        if surplus <= 0 and (not wanted or self._series + wanted <= MAX_SERIES):
            return
        tick = next(self._ticks)
        if surplus <= 0 and tick < self._look_again:
            return
        if self._series + wanted > MAX_SERIES:
            self._drop_surplus_keys()
        if surplus > 0:  # some more than must be, since it takes a look at all of them
            surplus += MAX_STAGES // 8
        if self._series + wanted > MAX_SERIES:
            wanted += MAX_SERIES // 16
        self._drop_stages(run, row, found, wanted, surplus, tick)
        if self._series + wanted > MAX_SERIES:
            self._look_again = tick + QUIET_ROWS

    def _drop_surplus_keys(self) -> None:
        for run in self._runs.values():
            for stage in run.stages.values():
                if stage.key_count > LISTED_METRICS:
                    self._release(run, stage.drop_surplus(LISTED_METRICS))

    def _drop_stages(
        self,
        run: LiveRun,
        row: OutRow,
        kept: Collection[str],
        wanted: int,
        surplus: int,
        tick: int,
    ) -> None:
        """Give up stages, the one that is silent longest first."""
        latest = max((n for n in self._runs if n < FIRST_STAGE_RUN), default=0)

        def is_quiet(number: int, stage: LiveStage) -> bool:
            if number < latest or tick - stage.seen >= QUIET_ROWS:
                return True
            return stage.row is None or row.time_s - stage.row.time_s >= QUIET_S

        candidates = sorted(
            (
                (number >= latest, stage.seen, number, stage)
                for number, other in self._runs.items()
                for name, stage in other.stages.items()
                if not (other is run and name in kept)
            ),
            key=lambda one: one[:2],
        )
        changed: set[int] = set()
        for _, _, number, stage in candidates:
            has_room = self._series + wanted <= MAX_SERIES
            if surplus <= 0 and (has_room or not is_quiet(number, stage)):
                if has_room:
                    break
                continue
            other = self._runs[number]
            if number not in changed:
                changed.add(number)
                other.forget_combinations()
            other.drop_stage(stage.name)
            self._release(other, stage.all_keys())
            _count(other.dropped, stage.name)
            surplus -= 1

    def _begin_pipelines(self, run: LiveRun, names: list[str]) -> None:
        """Begin some; of very many those go that have ended, then those that are silent longest."""
        names = names[:MAX_PIPELINES]
        surplus = sum(len(other.pipelines) for other in self._runs.values())
        surplus += len(names) - MAX_PIPELINES
        if surplus > 0:
            candidates = sorted(
                (one.is_running, one.seen, number, name)
                for number, other in self._runs.items()
                for name, one in other.pipelines.items()
            )
            for _, _, number, name in candidates[:surplus]:
                self._runs[number].forget_combinations()
                del self._runs[number].pipelines[name]
        for name in names:
            run.pipelines[name] = LivePipeline(name, self._ticks)

    def _drop_nodes(self) -> None:
        """Rows of nodes are large: those of runs of long ago are kept no longer."""
        numbers = sorted(n for n, run in self._runs.items() if run.nodes.row is not None)
        for number in numbers[: -MAX_RUNS_WITH_NODES or None]:
            self._runs[number].forget_nodes()


def _hash(name: str) -> int:
    return zlib.crc32(name.encode(errors="surrogatepass"))


def _count(counted: set[int], name: str) -> None:
    if len(counted) < MAX_UNTRACKED_SERIES:
        counted.add(_hash(name))


def _pipelines_in(keys: list[str], metrics: dict[str, Scalar]) -> list[str]:
    """The namespaces of the pipelines that a row tells of."""
    axis, *others = PIPELINE_KEYS
    prefixes = [key.removesuffix(axis) for key in keys if key.endswith(axis)]
    return [
        prefix.removesuffix("/")
        for prefix in prefixes
        if prefix[-1:] in ("", "/") and all(prefix + other in metrics for other in others)
    ]
