"""What a run amounts to so far: its config, metric definitions and summary, from its items.

W&B's client keeps these per process, and a process that resumes a run begins without them
(keys logged before are missing, a maximum starts anew). So they are folded here, and whoever
opens the run again is given the whole.
"""

from __future__ import annotations

import math
from typing import Any

from raywb.rows import Scalar
from raywb.service.outbox import Item, OutConfig, OutDefine, OutRow, OutSummary

__all__ = ["Fold"]

_Number = int | float


class _Aggregate:
    """Running values of one key."""

    __slots__ = ("count", "first", "last", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.minimum = math.inf
        self.maximum = -math.inf
        self.first: _Number = 0.0
        self.last: _Number = 0.0

    def add(self, value: _Number) -> None:
        if self.count == 0:
            self.first = value
        self.count += 1
        self.total += value
        self.last = value
        self.minimum = min(self.minimum, value)
        self.maximum = max(self.maximum, value)

    def get(self, kind: str) -> float:
        values = {
            "mean": self.total / self.count,
            "min": self.minimum,
            "max": self.maximum,
            "first": self.first,
            "last": self.last,
        }
        return values[kind]


#: What is kept of a key by name; ``copy`` is W&B's word for the plain last value.
_KEPT = ("min", "max", "mean", "first", "last")


class Fold:
    """The state of one run after the items that were applied.

    Attributes:
        config: the run's config.
        defines: metric definitions by name, in order of first sight.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.defines: dict[str, OutDefine] = {}
        self._explicit: dict[str, Any] = {}
        self._last: dict[str, Scalar] = {}
        self._aggregates: dict[str, _Aggregate] = {}
        self._kinds: dict[str, tuple[str, ...]] = {}
        self._aggregating = False

    def apply(self, item: Item) -> None:
        """Take one item in, in the order of the outbox."""
        match item:
            case OutRow():
                self._last.update(item.metrics)
                if self._explicit:
                    for key in self._explicit.keys() & item.metrics.keys():
                        del self._explicit[key]
                if self._aggregating:
                    self._aggregate(item.metrics)
            case OutConfig():
                self.config.update(item.values)
            case OutSummary():
                self._explicit.update(item.values)
            case OutDefine():
                self.defines[item.name] = item
                self._kinds.clear()
                self._aggregating = self._aggregating or item.summary is not None

    def _kinds_of(self, key: str) -> tuple[str, ...]:
        """What is to be kept of a key: its own definition says, else the longest glob."""
        if key not in self._kinds:
            summaries = {name: d.summary for name, d in self.defines.items() if d.summary}
            globs = [g for g in summaries if g[-1] == "*" and key.startswith(g[:-1])]
            name = key if key in summaries else max(globs, key=len, default=None)
            self._kinds[key] = tuple((summaries[name] or "").split(",")) if name else ()
        return self._kinds[key]

    def _aggregate(self, metrics: dict[str, Scalar]) -> None:
        for key, value in metrics.items():
            if not self._kinds_of(key) or not isinstance(value, (int, float)):
                continue
            if not math.isnan(value):
                self._aggregates.setdefault(key, _Aggregate()).add(value)

    def summary(self) -> dict[str, Any]:
        """The whole summary as W&B would show it for a run that was never interrupted."""
        values: dict[str, Any] = {}
        for key, last in self._last.items():
            kinds = self._kinds_of(key)
            kept = [kind for kind in kinds if kind in _KEPT]
            if key in self._aggregates and kept:
                values[key] = {kind: self._aggregates[key].get(kind) for kind in kept}
            elif "none" not in kinds:
                values[key] = last
        return values | self._explicit
