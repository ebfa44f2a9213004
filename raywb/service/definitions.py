"""Metric definitions of a run: whose axis is what, and how ranks' values become one.

An axis is defined when its namespace is first seen in a run, and what the user defined is never
undone. Everything here follows from the items that are already in the outbox, and from the
definitions that clients sent, so it is the same after a restart.
"""

from __future__ import annotations

from collections.abc import Iterable

from raywb.rows import Scalar
from raywb.service.outbox import Item, OutDefine

__all__ = ["Definitions"]


class Definitions:
    """What is defined in the present run."""

    def __init__(self) -> None:
        self._run = 0
        self._across: dict[str, str] = {}
        self._across_of: dict[str, str] = {}
        self._defined: set[str] = set()
        self._without_axis: dict[str, str] = {}
        self._axes: dict[str, str] = {}
        self._nested: set[str] = set()

    def open_run(self, run: int) -> None:
        """In another run nothing is defined yet; how ranks become one is the clients' to say."""
        self._run = run
        self._defined.clear()
        self._without_axis.clear()
        self._axes.clear()
        self._nested.clear()

    def note(self, item: OutDefine) -> None:
        """Take over a definition that is in the outbox."""
        self._remember(item)
        if item.name.endswith("/*") and item.step_metric and item.step_sync is False:
            self._remember_axis(item.name[:-1], item.step_metric)

    def set_across_ranks(self, name: str, kind: str) -> None:
        """Say how the values of a metric, or of all that a glob covers, become one."""
        self._across[name] = kind
        self._across_of.clear()

    def across_ranks(self, name: str) -> str:
        """How a key's values of several ranks become one: its own definition, else a glob's."""
        if not self._across:
            return "mean"
        kind = self._across_of.get(name)
        if kind is None:
            globs = [g for g in self._across if g[-1] == "*" and name.startswith(g[:-1])]
            found = name if name in self._across else max(globs, key=len, default=None)
            kind = self._across_of[name] = self._across[found] if found else "mean"
        return kind

    def put_steps(
        self, items: list[Item], prefix: str, metrics: dict[str, Scalar], step: int | float
    ) -> None:
        """Add the step as data, on the axis of the stage, or of each key's own namespace."""
        if prefix:
            metrics[prefix + "step"] = step
            self.define_axis(items, prefix, prefix + "step", metrics)
            return
        for key in list(metrics):
            namespace = key.rpartition("/")[0]
            axis = f"{namespace}/step" if namespace else "step"
            if key == axis:
                continue
            if namespace:
                self.define_axis(items, namespace + "/", axis, (key,))
            else:
                self._define(items, axis)
                self._define(items, key, axis)
            metrics.setdefault(axis, step)

    def define_axis(self, items: list[Item], prefix: str, axis: str, keys: Iterable[str]) -> None:
        """Define a namespace's axis on first sight.

        ``a/*`` also matches the keys of ``a/b/``. W&B does not say which of two globs counts, so
        the keys of a namespace that lies within another one are defined by their full names; so
        are those that the user has defined without an axis, which would be left without one.
        """
        self._remember_axis(prefix, axis)
        self._define(items, axis)
        self._define(items, prefix + "*", axis)
        if self._without_axis or prefix in self._nested:
            for key in keys:
                if key != axis and (prefix in self._nested or key in self._without_axis):
                    self._define(items, key, axis)

    def _remember_axis(self, prefix: str, axis: str) -> None:
        if prefix not in self._axes:
            # One look at each: there may be as many namespaces as there are workers.
            self._nested |= {inner for inner in self._axes if inner.startswith(prefix)}
            if any(prefix.startswith(outer) for outer in self._axes):
                self._nested.add(prefix)
            self._axes[prefix] = axis

    def _define(self, items: list[Item], name: str, axis: str | None = None) -> None:
        """Define a name of ours once in a run, unless the user has defined it with an axis."""
        summary = None
        if name in self._defined:
            if axis is None or name not in self._without_axis:
                return
            summary = self._without_axis[name]
        item = OutDefine(self._run, name, axis, summary, None if axis is None else False)
        self._remember(item)
        items.append(item)

    def _remember(self, item: OutDefine) -> None:
        self._defined.add(item.name)
        if item.step_metric is None and item.summary is not None:
            self._without_axis[item.name] = item.summary
        else:
            self._without_axis.pop(item.name, None)
