"""How busy the nodes of a run are, as its rows tell: the newest row, and who is missing."""

from __future__ import annotations

import math

from raywb.live import NodeUsage
from raywb.rows import Scalar
from raywb.service.outbox import OutRow

__all__ = ["NODES", "NODES_SIGN", "LiveNodes", "NodesRows"]

#: What keys of nodes begin with, and the one that is in all of their rows.
NODES = "nodes/"
NODES_SIGN = "nodes/answered"

#: What stands in a node's place in keys about all of them.
_ALL_NODES = ("mean", "min", "max")

#: Nodes that no longer answer: they are forgotten after so many rows, and of so many the oldest.
GONE_ROWS = 60
MAX_GONE = 512


class NodesRows:
    """Rows that tell of the same nodes."""

    __slots__ = ("names", "nodes")

    def __init__(self, nodes: LiveNodes, row: OutRow) -> None:
        self.nodes = nodes
        self.names = frozenset(_split(row.metrics)[0])

    def take(self, row: OutRow) -> None:
        """Take one row in."""
        self.nodes.take(row, self.names)

    def forget(self) -> None:
        """The nodes themselves know their row."""


class LiveNodes:
    """The newest row of the nodes, and what those said last that are not in it.

    Attributes:
        row: the newest one.
    """

    def __init__(self) -> None:
        self.row: OutRow | None = None
        self._rows = 0
        self._names: frozenset[str] = frozenset()
        #: By name: the number of the row, its time, and what it said of the node.
        self._gone: dict[str, tuple[int, float, dict[str, float]]] = {}

    @property
    def alive(self) -> int:
        """How many nodes the newest row says that there are."""
        alive = 0 if self.row is None else self.row.metrics.get(NODES + "alive", 0)
        is_count = isinstance(alive, (int, float)) and 0 <= alive < 2**31
        return int(alive) if is_count else 0

    def take(self, row: OutRow, names: frozenset[str]) -> None:
        """Take one row in, which tells of the nodes with these names."""
        if names is not self._names and self.row is not None:
            self._note_gone(self.row, self._names - names)
            for name in names & self._gone.keys():
                del self._gone[name]
        self.row, self._names = row, names
        self._rows += 1
        # In the order in which they went.
        while self._gone:
            name, (number, _, _) = next(iter(self._gone.items()))
            if number > self._rows - 1 - GONE_ROWS and len(self._gone) <= MAX_GONE:
                break
            del self._gone[name]

    def _note_gone(self, row: OutRow, names: frozenset[str]) -> None:
        if not names:
            return
        said = _split(row.metrics)[0]
        for name in sorted(names):
            self._gone[name] = (self._rows, row.time_s, said[name])

    def describe(
        self, now_s: float | None, stale_s: float
    ) -> tuple[list[NodeUsage], dict[str, float]]:
        """The nodes by name, and what is said of all of them.

        Args:
            now_s: the present; None where there is none, as in a directory that was left.
            stale_s: a row older than this says nothing of the present.
        """
        if self.row is None:
            return [], {}
        said, of_all = _split(self.row.metrics)
        is_old = now_s is not None and now_s - self.row.time_s > stale_s
        if is_old:
            # As if a row said that nobody answered: a mean of long ago is no present one.
            of_all = {key: value for key, value in of_all.items() if key == "alive"}
            of_all["answered"] = 0
        elif not said and of_all.get("answered"):
            return [], of_all  # the cluster has become so large that rows hold means only
        usage = [
            NodeUsage(name=name, values=values, time_s=self.row.time_s, stale=is_old)
            for name, values in said.items()
        ]
        usage += [
            NodeUsage(name=name, values=values, time_s=time_s, stale=True)
            for name, (_, time_s, values) in self._gone.items()
        ]
        return sorted(usage, key=lambda one: one.name), of_all


def _split(
    metrics: dict[str, Scalar],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What a row of the nodes says of each, and of all together."""
    by_name: dict[str, dict[str, float]] = {}
    of_all: dict[str, float] = {}
    for key, value in metrics.items():
        if not key.startswith(NODES):
            continue
        name, slash, rest = key[len(NODES) :].partition("/")
        is_number = not isinstance(value, (str, bool)) and math.isfinite(value)
        if slash and name not in _ALL_NODES:
            # It is there, whatever it says: the names are those of the keys.
            values = by_name.setdefault(name, {})
            if is_number:
                values[rest] = value  # type: ignore[assignment]
        elif is_number:
            of_all[name + slash + rest] = value  # type: ignore[assignment]
    return by_name, of_all
