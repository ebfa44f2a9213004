"""Which runs `wandb.Api().runs(path, filters=…)` asks for: MongoDB-like filters on a run."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from wandb_graphql import QueryError
from wandb_store import ServerRun, flat

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$in": lambda value, wanted: value in wanted,
    "$nin": lambda value, wanted: value not in wanted,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


def matches(run: ServerRun, wanted: Mapping[str, Any]) -> bool:
    """Whether a run fits filters in the MongoDB manner."""
    return all(_holds(run, key, condition) for key, condition in wanted.items())


def _holds(run: ServerRun, key: str, condition: Any) -> bool:
    if key == "$and":
        return all(matches(run, one) for one in condition)
    if key == "$or":
        return any(matches(run, one) for one in condition)
    value = _field(run, key)
    if not isinstance(condition, dict):
        return bool(value == condition)
    unknown = condition.keys() - COMPARISONS.keys()
    if unknown:
        raise QueryError(f"filter operators {sorted(unknown)} are not supported here")
    return all(COMPARISONS[name](value, operand) for name, operand in condition.items())


def _field(run: ServerRun, key: str) -> Any:
    """What a filter calls by this name."""
    names: dict[str, Any] = {
        "group": run.group,
        "jobType": run.job_type,
        "name": run.run_id,
        "state": run.state,
    }
    names |= {"displayName": run.display_name, "display_name": run.display_name}
    names |= {"job_type": run.job_type, "tags": run.tags, "createdAt": run.created_at}
    place, _, rest = key.partition(".")
    if place == "config":
        return flat(run.config).get(rest.removesuffix(".value"))
    if place in ("summary", "summary_metrics"):
        return flat(run.summary).get(rest)
    if key not in names:
        raise QueryError(f"filter key {key!r} is not supported here")
    return names[key]
