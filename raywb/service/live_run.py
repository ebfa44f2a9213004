"""What rows of one run tell of: its stages, and which of them each key belongs to.

A namespace with an axis of its own is a stage. Where keys have none, their stage is what all of
them in a row have in common, or each key's own namespace; a wider one takes over what was taken
for a stage within it. So every key is in one stage at any time.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping

from raywb.service.live_nodes import LiveNodes, NodesRows
from raywb.service.live_pipeline import LivePipeline
from raywb.service.live_stage import LiveStage, RowsAlike

__all__ = ["LiveRun", "Part"]

Part = LivePipeline | NodesRows | RowsAlike

#: Definitions of axes that are remembered, of namespaces and of single keys each.
MAX_AXES = 20_000


class LiveRun:
    """What is known of one run.

    Args:
        ticks: counts the rows, so that stages know whose row is newer.

    Attributes:
        known: what rows with these keys tell of.
        keys: tracked ones of stages.
        shown: hashes of keys that are shown without being tracked: of nodes and pipelines.
        untracked: hashes of keys that there was no room for.
        axes: the axis of each namespace that has one, as it was defined.
        dropped: hashes of the names of stages that there was no room for.
    """

    def __init__(self, ticks: Iterator[int]) -> None:
        self._ticks = ticks
        self.known: dict[tuple[str, ...], list[Part]] = {}
        self.keys: set[str] = set()
        self.shown: set[int] = set()
        self.untracked: set[int] = set()
        self.dropped: set[int] = set()
        self.axes: dict[str, str] = {}
        self._key_axes: dict[str, str] = {}
        self.stages: dict[str, LiveStage] = {}
        #: Which stages lie within each namespace.
        self._lying_within: dict[str, dict[str, None]] = {}
        self.pipelines: dict[str, LivePipeline] = {}
        self.nodes = LiveNodes()
        self._nodes_keys: tuple[str, ...] = ()

    def note_nodes(self, keys: tuple[str, ...]) -> None:
        """Rows of nodes have these keys now; they are many, so no others of theirs are kept."""
        if keys != self._nodes_keys:
            self.known.pop(self._nodes_keys, None)
            self._nodes_keys = keys

    def forget_combinations(self) -> None:
        """Find out anew what each combination of keys says; what rows said stays."""
        for parts in self.known.values():
            for part in parts:
                part.forget()
        self.known.clear()

    def forget_nodes(self) -> None:
        """Forget the nodes, and what their rows are like."""
        self.forget_combinations()
        self.nodes = LiveNodes()

    def define(self, name: str, axis: str) -> None:
        """Take over the definition of an axis: of a namespace, of everything, or of one key."""
        if name == "*" or name.endswith("/*"):
            self._define_namespace(name[:-2], axis)
        elif self._key_axes.get(name) != axis and len(self._key_axes) < MAX_AXES:
            self._key_axes[name] = axis
            (namespace,) = self.namespaces([name])
            if namespace in self.stages:
                self.stages[namespace].axis_has_changed()

    def _define_namespace(self, namespace: str, axis: str) -> None:
        if self.axes.get(namespace) == axis or len(self.axes) >= MAX_AXES:
            return
        wider = self._stage_around(namespace)
        self.axes[namespace] = axis
        inner = self._inner({namespace})
        if not inner and wider is None and namespace not in self.stages:
            return
        self.forget_combinations()
        stage = self.stages.get(namespace) or self._new_stage(namespace)
        for name in inner:
            stage.take_over(self.drop_stage(name))
        if wider is not None:
            stage.take_over(wider)
            if not wider.key_count:
                self.drop_stage(wider.name)
        stage.axis_has_changed()
        if stage.row is None:
            self.drop_stage(namespace)

    def _stage_around(self, namespace: str) -> LiveStage | None:
        """The stage that a namespace's keys belong to as long as it is none itself."""
        if namespace in self.stages or not namespace:
            return None
        found = _within(namespace, self.stages)
        return self.stages.get("" if found is None and "" in self.axes else found or namespace)

    def begin(self, names: Collection[str]) -> None:
        """Begin stages with these names; each takes over what lies within it."""
        inner = self._inner(names)
        if inner:
            self.forget_combinations()
        for name in names:
            self._new_stage(name)
        for name, wider in inner.items():
            self.stages[wider].take_over(self.drop_stage(name))

    def _new_stage(self, name: str) -> LiveStage:
        stage = LiveStage(name, self._ticks, self.axes, self._key_axes)
        self.stages[name] = stage
        for around in _around(name):
            self._lying_within.setdefault(around, {})[name] = None
        return stage

    def drop_stage(self, name: str) -> LiveStage:
        """Keep a stage no longer; combinations of keys that tell of it must be forgotten."""
        for around in _around(name):
            within = self._lying_within[around]
            del within[name]
            if not within:
                del self._lying_within[around]
        return self.stages.pop(name)

    def _inner(self, names: Collection[str]) -> dict[str, str]:
        """Stages without an axis of their own that lie within one of these, and in which."""
        found: dict[str, str] = {}
        for wider in sorted(names):  # of two that hold it, the one further in
            if wider or "" not in self.axes:
                inner: Iterable[str] = self._lying_within.get(wider, ())
            else:  # everything that has no axis of its own
                inner = [n for n in self.stages if n and _within(n, self.axes) is None]
            found |= {name: wider for name in inner if name not in self.axes and name not in names}
        return found

    def namespaces(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Which stage each key of a row belongs to; some of them may have to begin yet."""
        stage_of: dict[str, str] = {}
        rest = []
        for key in keys:
            namespace = _within(key, self.axes)
            if namespace is not None:
                stage_of[key] = namespace
            elif "" in self.axes:
                stage_of[key] = ""
            else:
                rest.append(key)
        common = _common_namespace(rest)
        wider: dict[str, str] = {}
        for own in sorted({common or key.rpartition("/")[0] for key in rest}):
            # The wider ones come first, and what is known already is wider than what is within.
            around = _within(own + "/", wider)
            if around is not None:
                wider[own] = wider[around]
            else:
                wider[own] = _within(own + "/", self.stages) or own
        found: dict[str, list[str]] = {}
        for key in keys:
            stage = stage_of.get(key)
            if stage is None:
                stage = wider[common or key.rpartition("/")[0]]
            found.setdefault(stage, []).append(key)
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


def _around(name: str) -> Iterator[str]:
    """The namespaces that one lies in, from within."""
    while name := name.rpartition("/")[0]:
        yield name


def _within(key: str, namespaces: Mapping[str, object]) -> str | None:
    """The longest of the namespaces that a key lies in."""
    while key:
        key = key.rpartition("/")[0]
        if key and key in namespaces:
            return key
    return None
