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
    """Running minimum, maximum and mean of one key."""

    __slots__ = ("count", "maximum", "minimum", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.minimum = math.inf
        self.maximum = -math.inf

    def add(self, value: _Number) -> None:
        self.count += 1
        self.total += value
        self.minimum = min(self.minimum, value)
        self.maximum = max(self.maximum, value)

    def get(self, kind: str) -> float:
        if kind == "mean":
            return self.total / self.count
        return self.minimum if kind == "min" else self.maximum


class Fold:
    """The state of one run after the items that were applied.

    Attributes:
        config: the run's config.
        defines: metric definitions by name, in order of first sight.
        explicit_summary: what was set with ``summary.update``.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.defines: dict[str, OutDefine] = {}
        self.explicit_summary: dict[str, Any] = {}
        self._last: dict[str, Scalar] = {}
        self._aggregates: dict[str, _Aggregate] = {}

    def apply(self, item: Item) -> None:
        """Take one item in, in the order of the outbox."""
        match item:
            case OutRow():
                self._last.update(item.metrics)
                if self._aggregates:
                    self._aggregate(item.metrics)
            case OutConfig():
                self.config.update(item.values)
            case OutSummary():
                self.explicit_summary.update(item.values)
            case OutDefine():
                self.defines[item.name] = item
                if item.summary:
                    self._aggregates.setdefault(item.name, _Aggregate())

    def _aggregate(self, metrics: dict[str, Scalar]) -> None:
        for key in self._aggregates.keys() & metrics.keys():
            value = metrics[key]
            if isinstance(value, (int, float)) and not math.isnan(value):
                self._aggregates[key].add(value)

    def summary(self) -> dict[str, Any]:
        """The whole summary as W&B would show it for a run that was never interrupted."""
        values: dict[str, Any] = dict(self._last)
        for name, aggregate in self._aggregates.items():
            kinds = [kind.strip() for kind in (self.defines[name].summary or "").split(",")]
            kept = [kind for kind in kinds if kind in ("min", "max", "mean")]
            if aggregate.count and kept:
                values[name] = {kind: aggregate.get(kind) for kind in kept}
        return values | self.explicit_summary
