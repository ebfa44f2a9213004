"""Calls on the nodes of a cluster, for cleaning up: waited for only so long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state.exception import RayStateApiException

__all__ = ["CLUSTER_GONE", "other_nodes", "run_on_nodes"]

_log = logging.getLogger(__name__)

#: What Ray raises when nobody answers any more.
CLUSTER_GONE = (RayError, RayStateApiException, ConnectionError, RuntimeError)

#: How long a recipe waits at its end for the nodes of a cluster to clean up.
_NODES_S = 20.0


def run_on_nodes(calls: Mapping[str, tuple[Callable[..., None], Any]]) -> None:
    """Call a function with an argument on each of some nodes, waiting for them only so long.

    For cleaning up: what cannot be reached any more is left alone, and the log says so.
    """
    try:
        tasks = [
            ray.remote(num_cpus=0)(function)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))
            .remote(argument)
            for node_id, (function, argument) in calls.items()
        ]
        if tasks:
            ray.wait(tasks, num_returns=len(tasks), timeout=_NODES_S)
    except CLUSTER_GONE as error:
        _log.warning("cannot clean up on other nodes: %s", error)


def other_nodes() -> list[str]:
    """Return the ids of the nodes beside this one; none when the cluster is gone."""
    try:
        here = ray.get_runtime_context().get_node_id()
        return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    except CLUSTER_GONE as error:
        _log.warning("cannot list the nodes: %s", error)
        return []
