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
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
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


class Filters:
    """Filters in the MongoDB manner, as one store takes them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def matching(
        self, runs: list[ServerRun], wanted: Mapping[str, Any], order: str | None
    ) -> list[ServerRun]:
        """The runs that fit, in this order; oldest first where none is asked for."""
        self._check(wanted)
        found = [run for run in runs if self._matches(run, wanted)]
        key = (order or "+created_at").lstrip("+-")
        if key in self._store.refused or key not in TIMES:
            raise QueryError(f"order {order!r} is not supported here")
        # Times of this format sort as texts do, which matters with thousands of runs.
        by_text = key in ("created_at", "createdAt")
        found.sort(
            key=(lambda run: run.created_at) if by_text else TIMES[key],
            reverse=(order or "").startswith("-"),
        )
        return found

    def _check(self, wanted: Any) -> None:
        """Refuse what this server does not know, whichever run it would be asked of."""
        if isinstance(wanted, list):
            for one in wanted:
                self._check(one)
        elif isinstance(wanted, dict):
            for key, condition in wanted.items():
                if key in self._store.refused:
                    raise QueryError(f"filter key {key!r} is not supported here")
                self._check(condition)

    def _matches(self, run: ServerRun, wanted: Mapping[str, Any]) -> bool:
        return all(self._holds(run, key, condition) for key, condition in wanted.items())

    def _holds(self, run: ServerRun, key: str, condition: Any) -> bool:
        if key in self._store.passed_over:
            return True
        if key == "$and":
            return all(self._matches(run, one) for one in condition)
        if key == "$or":
            return any(self._matches(run, one) for one in condition)
        value = _field(run, key)
        if not isinstance(condition, dict):
            condition = {"$eq": condition}
        unknown = condition.keys() - COMPARISONS.keys()
        if unknown:
            raise QueryError(f"filter operators {sorted(unknown)} are not supported here")
        operand: Callable[[Any], Any] = _time if key in TIMES else lambda given: given
        return all(COMPARISONS[name](value, operand(given)) for name, given in condition.items())


def _time(given: Any) -> float:
    try:
        return seconds(given)
    except (TypeError, ValueError) as error:
        raise QueryError(f"{given!r} is no ISO time") from error


def _field(run: ServerRun, key: str) -> Any:
    """What a filter calls by this name."""
    if key in FIELDS:
        return FIELDS[key](run)
    if key in TIMES:
        return TIMES[key](run)
    place, _, rest = key.partition(".")
    if place == "config":
        return flat(run.config).get(rest.removesuffix(".value"))
    if place in ("summary", "summary_metrics"):
        return flat(run.summary).get(rest)
    raise QueryError(f"filter key {key!r} is not supported here")
