"""Which runs `wandb.Api().runs(path, filters=…)` asks for: MongoDB-like filters on a run."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from wandb_graphql import QueryError
from wandb_store import ServerRun, Store, flat, seconds

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$in": lambda value, wanted: value in wanted,
    "$nin": lambda value, wanted: value not in wanted,
    "$gt": lambda value, wanted: value is not None and value > wanted,
    "$gte": lambda value, wanted: value is not None and value >= wanted,
    "$lt": lambda value, wanted: value is not None and value < wanted,
    "$lte": lambda value, wanted: value is not None and value <= wanted,
    "$regex": lambda value, wanted: re.search(wanted, value or "") is not None,
}

FIELDS: dict[str, Callable[[ServerRun], Any]] = {
    "group": lambda run: run.group,
    "jobType": lambda run: run.job_type,
    "job_type": lambda run: run.job_type,
    "name": lambda run: run.run_id,
    "state": lambda run: run.state,
    "displayName": lambda run: run.display_name,
    "display_name": lambda run: run.display_name,
    "sweep": lambda run: run.sweep_name or None,
    "tags": lambda run: run.tags,
}

#: Times, which are compared with ISO times and with nothing else.
TIMES: dict[str, Callable[[ServerRun], float]] = {
    "createdAt": lambda run: seconds(run.created_at),
    "created_at": lambda run: seconds(run.created_at),
    "heartbeatAt": lambda run: run.heartbeat_s,
    "heartbeat_at": lambda run: run.heartbeat_s,
}


#: Whether a run fits.
Predicate = Callable[[ServerRun], bool]


class Filters:
    """Filters in the MongoDB manner, as one store takes them.

    They are translated once and then asked of each run: a real server has an index for them, and
    what is measured against this one is not to be its search.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def matching(
        self, runs: list[ServerRun], wanted: Mapping[str, Any], order: str | None
    ) -> list[ServerRun]:
        """The runs that fit, in this order; oldest first where none is asked for."""
        found = self.fitting(runs, wanted)
        key = (order or "+created_at").lstrip("+-")
        if key in self._store.refused or key not in TIMES:
            raise QueryError(f"order {order!r} is not supported here")
        # Times of this format sort as texts do, which matters with thousands of runs.
        by_text = key in ("created_at", "createdAt")
        found.sort(
            key=operator.attrgetter("created_at") if by_text else TIMES[key],
            reverse=(order or "").startswith("-"),
        )
        return found

    def fitting(self, runs: list[ServerRun], wanted: Mapping[str, Any]) -> list[ServerRun]:
        """The runs that fit, in no order."""
        fits = self._all(wanted)
        return [run for run in runs if fits(run)] if wanted else list(runs)

    def _all(self, wanted: Mapping[str, Any]) -> Predicate:
        parts = [self._one(key, condition) for key, condition in wanted.items()]
        return parts[0] if len(parts) == 1 else lambda run: all(fits(run) for fits in parts)

    def _one(self, key: str, condition: Any) -> Predicate:
        if key in self._store.refused:
            raise QueryError(f"filter key {key!r} is not supported here")
        if key in self._store.passed_over:
            return lambda _: True
        if key in ("$and", "$or"):
            parts = [self._all(one) for one in condition]
            some = all if key == "$and" else any
            return lambda run: some(fits(run) for fits in parts)
        if not isinstance(condition, dict):
            condition = {"$eq": condition}
        unknown = condition.keys() - COMPARISONS.keys()
        if unknown:
            raise QueryError(f"filter operators {sorted(unknown)} are not supported here")
        value = _field(key)
        tests = [
            (COMPARISONS[name], _time(operand) if key in TIMES else operand)
            for name, operand in condition.items()
        ]
        return lambda run: all(compare(value(run), operand) for compare, operand in tests)


def _time(given: Any) -> float:
    try:
        return seconds(given)
    except (TypeError, ValueError) as error:
        raise QueryError(f"{given!r} is no ISO time") from error


def _field(key: str) -> Callable[[ServerRun], Any]:
    """How to read what a filter calls by this name."""
    known = FIELDS.get(key) or TIMES.get(key)
    if known is not None:
        return known
    place, _, rest = key.partition(".")
    if place == "config":
        return lambda run: flat(run.config).get(rest.removesuffix(".value"))
    if place in ("summary", "summary_metrics"):
        return lambda run: flat(run.summary).get(rest)
    raise QueryError(f"filter key {key!r} is not supported here")
