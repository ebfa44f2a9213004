"""Which W&B group a cluster's runs belong to, and why (SPEC C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

__all__ = ["Group", "resolve_group"]


class Group(NamedTuple):
    """A group's name (None: no group) and where it came from, as a person would say it."""

    name: str | None
    source: str


def resolve_group(
    explicit: str | None,
    cluster_id: str,
    environment: Mapping[str, str],
) -> Group:
    """Find the group: the first that answers wins.

    The order is the explicit setting (the empty string means "no group"), ``WANDB_GROUP``,
    ``SUBMITIT_JOB_ID``, ``SLURM_JOB_ID``, Ray's job submission id, and a name made for the
    cluster.
    """
    if explicit is not None:
        return Group(explicit or None, "the settings" if explicit else "the settings (no group)")
    if name := environment.get("WANDB_GROUP"):
        return Group(name, "WANDB_GROUP")
    for variable in ("SUBMITIT_JOB_ID", "SLURM_JOB_ID"):
        if job_id := environment.get(variable):
            return Group(f"slurm-{job_id}", variable)
    if submission_id := _submission_id(environment):
        return Group(f"ray-{submission_id}", "Ray's job submission id")
    return Group(f"ray-cluster-{cluster_id[:8]}", "the cluster")


def _submission_id(environment: Mapping[str, str]) -> str | None:
    """Ray's job submission id, from the JSON that a submitted driver finds in its environment."""
    text = environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    if not text:
        return None
    try:
        config = msgspec.json.decode(text, type=_JobConfig)
    except msgspec.DecodeError:
        return None  # somebody else's variable of that name is no submission id
    return config.metadata.get("job_submission_id")


class _JobConfig(msgspec.Struct):
    metadata: dict[str, str] = {}
