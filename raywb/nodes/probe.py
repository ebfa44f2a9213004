"""The Ray side of the inventory: who is there, and one probe on each node.

Only the service calls this, in a thread of its own; never a thread of ours in a user's process.
A look asks Ray's control store and touches no node. A probe is one task on its node, and that
sets the idle time back, once, that Ray's autoscaler goes by: it is sent to a node once in the
node's life, and again only if it brought nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from raywb.nodes.node import collect_node_facts
from raywb.nodes.records import SeenNode

__all__ = [
    "GROUP_NAME",
    "Probe",
    "ProbeResult",
    "Tell",
    "alive_nodes",
    "look_at_nodes",
    "probe_nodes",
]

_log = logging.getLogger(__name__)

#: The placement group's name, by which one is found that a killed service left.
GROUP_NAME = "raywb-probes"

#: Longest that the placement group is waited for, in seconds: it is made in milliseconds, or a
#: node hangs.
RESERVE_S = 8.0

#: How often answers are looked for, and whether the nodes are still there, in seconds.
LOOK_S = 1.0


class ProbeResult(NamedTuple):
    """What a probe brought: facts, or the reason why not."""

    facts: dict[str, Any] | None
    error: str | None = None


#: Is told each node's result as soon as it is there.
Tell = Callable[[str, ProbeResult], None]

#: What runs on a node; returns the node's id and what it found there.
Probe = Callable[[], tuple[str, dict[str, Any]]]


def look_at_nodes() -> list[SeenNode]:
    """Every living node, as Ray's control store knows it; no node notices."""
    return [
        SeenNode(
            node_id=node["NodeID"],
            hostname=node.get("NodeManagerHostname") or "",
            ip=node.get("NodeManagerAddress") or "",
            is_head="node:__internal_head__" in node["Resources"],
            resources={name: float(amount) for name, amount in node["Resources"].items()},
            labels=dict(node.get("Labels") or {}),
            metrics_port=max(int(node.get("MetricsExportPort") or 0), 0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def probe_nodes(
    node_ids: Collection[str],
    timeout_s: float,
    tell: Tell,
    *,
    probe: Probe | None = None,
    group_name: str = GROUP_NAME,
) -> None:
    """Collect the facts of these nodes with a task on each, and tell each node's result once.

    One placement group has a bundle on each node, which claims a byte of its memory, so that the
    tasks run when every CPU and GPU is taken. A node that dies or hangs costs itself only: where
    the group cannot be had because of one, the tasks go to their nodes without it. Nothing is
    left behind: the group is removed whatever happens, and a task that did not end goes with it.

    Args:
        node_ids: nodes that were alive a moment ago.
        timeout_s: longest that it may take; cold nodes need some seconds to start a worker.
        tell: is told each node's result as soon as it is there, in the calling thread.
        probe: what runs on each node; by default it collects the node's facts.
        group_name: the placement group's name. One of that name is removed first, so whoever may
            probe while the service does takes another.
    """
    deadline = time.monotonic() + timeout_s
    group, wanted = _reserve(sorted(node_ids), min(RESERVE_S, timeout_s / 3), group_name)
    for node_id in sorted(set(node_ids) - set(wanted)):
        tell(node_id, ProbeResult(None, "the node left before it was probed"))
    try:
        _collect(_send(wanted, group, probe or _probe_here), deadline, timeout_s, tell)
    finally:
        if group is not None:
            remove_placement_group(group)


def _reserve(
    wanted: list[str], timeout_s: float, group_name: str
) -> tuple[PlacementGroup | None, list[str]]:
    """A placement group with a bundle on each node, and the nodes that are still there.

    A group is made whole or not at all, so it is made again when a node of it has left. None
    where it cannot be had in time.
    """
    deadline = time.monotonic() + timeout_s
    while wanted:
        _remove_leftover(group_name)
        try:
            group = placement_group(
                [{"memory": 1} for _ in wanted],
                strategy="PACK",
                name=group_name,
                bundle_label_selector=[{"ray.io/node-id": node_id} for node_id in wanted],
            )
        except ray.exceptions.RaySystemError as error:
            _log.warning("raywb: no placement group over %d nodes: %s", len(wanted), error)
            break
        is_ready = False
        try:
            is_ready, left = _until_ready(group, wanted, deadline)
        finally:
            if not is_ready:
                # One that stays pending would look like demand to the autoscaler.
                remove_placement_group(group)
        if is_ready:
            return group, wanted
        if not left:
            _log.warning("raywb: no placement group over %d nodes in time", len(wanted))
            break
        wanted = [node_id for node_id in wanted if node_id not in left]
    return None, wanted


def _until_ready(
    group: PlacementGroup, wanted: Collection[str], deadline: float
) -> tuple[bool, set[str]]:
    """Wait for a group; whether it is ready, and the nodes that left meanwhile."""
    while time.monotonic() < deadline:
        if group.wait(LOOK_S):
            return True, set()
        if left := set(wanted) - alive_nodes():
            return False, left
    return False, set()


def _remove_leftover(group_name: str) -> None:
    """Remove the group of a service that was killed while it probed."""
    try:
        leftover = get_placement_group(group_name)
    except ValueError:
        return  # there is none
    remove_placement_group(leftover)


def _send(wanted: Sequence[str], group: PlacementGroup | None, probe: Probe) -> dict[Any, str]:
    task = ray.remote(probe)
    pending = {}
    for number, node_id in enumerate(wanted):
        strategy = (
            NodeAffinitySchedulingStrategy(node_id, soft=False)
            if group is None
            else PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        )
        options = task.options(
            name="raywb_probe", num_cpus=0, max_retries=0, scheduling_strategy=strategy
        )
        pending[options.remote()] = node_id
    return pending


def _collect(pending: dict[Any, str], deadline: float, timeout_s: float, tell: Tell) -> None:
    while pending:
        remaining_s = deadline - time.monotonic()
        done, _ = ray.wait(
            list(pending), num_returns=len(pending), timeout=max(min(remaining_s, LOOK_S), 0.0)
        )
        for reference in done:
            node_id = pending.pop(reference)
            tell(node_id, _result(reference, node_id))
        if remaining_s <= 0:
            break
        alive = alive_nodes() if pending else set()
        for reference, node_id in list(pending.items()):
            if node_id not in alive:
                del pending[reference]
                ray.cancel(reference)
                tell(node_id, ProbeResult(None, "the node left while it was probed"))
    for reference, node_id in pending.items():
        # Started later, it would only wake a node that has become idle.
        ray.cancel(reference)
        tell(node_id, ProbeResult(None, f"the probe did not answer within {timeout_s:g} s"))


def _result(reference: Any, node_id: str) -> ProbeResult:
    try:
        ran_on, facts = ray.get(reference)
    except ray.exceptions.TaskUnschedulableError:
        return ProbeResult(None, "the node left while it was probed")
    except ray.exceptions.RayError as error:
        # Ray's report of a task's failure ends with what was raised there.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return ProbeResult(None, f"the probe failed: {(lines or [type(error).__name__])[-1][:300]}")
    if ran_on != node_id:
        return ProbeResult(None, f"the probe ran on node {ran_on[:8]}")
    return ProbeResult(facts)


def _probe_here() -> tuple[str, dict[str, Any]]:
    return ray.get_runtime_context().get_node_id(), collect_node_facts()


def alive_nodes() -> set[str]:
    """Ids of the nodes that are there, as Ray's control store knows them."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
