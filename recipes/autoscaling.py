"""Nodes that Ray's autoscaler brings before a recipe begins, because cosmos-xenna asks for none.

xenna looks at the nodes once, when a pipeline starts, and places its workers on those; a node that
came later would stay empty, and an autoscaler would never learn that one is wanted. So a recipe
asks for CPUs, waits for them, and lets go of them at its end. Ray keeps one such request for the
whole cluster: a second recipe's replaces the first one's, whose nodes stay as long as they are at
work.

With the autoscaler's version 2 only, which ``ray up`` starts: version 1 does not say what it
cannot bring.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from recipes.errors import ClusterError

__all__ = ["autoscaler_is_there", "bring_cpus", "release_nodes"]

#: How long nodes may take from the request until they are part of the cluster: a machine has to be
#: found, started and set up.
_NODES_UP_S = 1200.0

_POLL_S = 0.5


def autoscaler_is_there() -> bool:
    """Say whether the connected cluster has an autoscaler that can be asked for nodes."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True))


def bring_cpus(num_cpus: int, announce: Callable[[str], None]) -> None:
    """Ask the autoscaler for nodes until the cluster has this many CPUs, and wait for them.

    Args:
        num_cpus: CPUs of the whole cluster, those that are there included.
        announce: Is told what is waited for, if anything is.

    Raises:
        ClusterError: The cluster's node types cannot make up so many CPUs, or they did not come in
            time; the request is withdrawn.
    """
    request_resources(num_cpus=num_cpus)
    if _cpus() >= num_cpus:
        return
    announce(f"Waiting for nodes: {_cpus()} CPUs are there, {num_cpus} are needed …")
    try:
        _wait_for(num_cpus)
    except BaseException:
        release_nodes()
        raise


def _wait_for(num_cpus: int) -> None:
    deadline = time.monotonic() + _NODES_UP_S
    while _cpus() < num_cpus:
        if _cannot_come(num_cpus):
            raise ClusterError(
                f"the Ray cluster cannot grow to {num_cpus} CPUs: its node types with their "
                "max_workers do not make up so many; ask for fewer with ray.num_cpus, or raise "
                "max_workers where the cluster is described"
            )
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the Ray cluster has {_cpus()} CPUs after {_NODES_UP_S / 60:.0f} minutes, and "
                f"{num_cpus} were asked for; `ray status` on the head says what became of them"
            )
        time.sleep(_POLL_S)


def release_nodes() -> None:
    """Withdraw the request, so that nodes without work may go; those at work stay."""
    request_resources(num_cpus=0)


def _cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 0))


def _cannot_come(num_cpus: int) -> bool:
    """Say whether the autoscaler has answered this very request with "impossible"."""
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status())
    impossible = reply.autoscaling_state.infeasible_cluster_resource_constraints
    return any(
        sum(request.count for request in constraint.resource_requests) == num_cpus
        for constraint in impossible
    )
