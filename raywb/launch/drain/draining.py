"""The drain itself: what it does on the head's machine, and on any other one.

On any machine the journals of its processes, living and dead, are read into the service, again and
again as long as something there goes on logging and there is time. On the head's machine the
service goes, too: so in time before the end the run is finished, W&B's server asked until it shows
all of it, and the run can be opened again by its id. Where the cluster is gone already, since the
same signal ended Ray, what it left on this machine is brought home from its directories.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from raywb.errors import NoClusterError, RaywbError, ServiceUnavailable
from raywb.launch.delivered import Delivery, Tell, deliver
from raywb.launch.left_here import directories_here
from raywb.reports import SweepReport

__all__ = ["drain"]

#: Pause between two looks through the journals of this machine, in seconds.
LOOK_PAUSE_S = 1.0

#: Longest time before the end at which the run is finished, in seconds; at most half of the
#: notice. W&B's server needs some of it to show the last rows.
FINISH_BEFORE_S = 40.0


class _Node(NamedTuple):
    """What a drain found on this machine.

    Attributes:
        is_head: the service is at work here.
        swept: the last look through the journals.
    """

    is_head: bool
    swept: SweepReport


def drain(
    address: str,
    environment: Mapping[str, str],
    tell: Tell,
    *,
    timeout_s: float,
    exit_code: int,
    on_connect: Callable[[], None] = lambda: None,
) -> Delivery:
    """Bring off this machine what raywb holds there; returns what is left, at the latest in time.

    Args:
        address: the Ray cluster, as for ``ray.init()``.
        environment: this process's.
        tell: is told what is going on.
        timeout_s: when the machine will be gone, less what its owner needs for other things.
        exit_code: how the run ends where the head goes: it was cut off.
        on_connect: called when Ray is connected, which has set signal handlers of its own.
    """
    deadline = time.monotonic() + timeout_s
    try:
        node = _sweep_until_quiet(address, environment, deadline, tell, on_connect)
    except NoClusterError as error:
        if not directories_here(environment):
            return Delivery(
                unanswered=f"{error}, and no directory of a service's is found on this machine: "
                "what lies in its journals, if anything does, is not delivered"
            )
        node = None
    except RaywbError as error:
        return Delivery(unanswered=str(error))
    if node is not None and not node.is_head:
        return _of_a_worker(node.swept)
    return deliver(
        address,
        environment,
        tell,
        timeout_s=max(deadline - time.monotonic(), 1.0),
        exit_code=exit_code,
        # A run of a gone cluster counts as cut off in the same way.
        here=node is None,
        on_connect=on_connect,
    )


def _sweep_until_quiet(
    address: str,
    environment: Mapping[str, str],
    deadline: float,
    tell: Tell,
    on_connect: Callable[[], None],
) -> _Node | None:
    """Take in journals of this machine until nobody there writes any more, or it is time.

    Returns:
        None where no service runs on the cluster.

    Raises:
        NoClusterError: there is none, or none any more.
        ServiceUnavailable: it cannot be asked.
    """
    import ray

    from raywb import cluster as ray_side
    from raywb.launch.connecting import connect_if_alive
    from raywb.orphans import sweep_node

    remaining_s = deadline - time.monotonic()
    connect_if_alive(address, environment)
    on_connect()
    try:
        service = ray_side.find_service()
        if service is None:
            return None
        cluster = ray_side.connect()
        joined = ray_side.join(service, cluster, timeout_s=max(remaining_s / 2, 1.0))
        if joined.endpoint is None:
            raise ServiceUnavailable("the raywb service does not listen yet")
        is_head = _is_head(cluster.node_id)
        tell(f"Draining run {joined.run.name} from {'the head' if is_head else 'a worker'} node")
        last = deadline - (min(FINISH_BEFORE_S, remaining_s / 2) if is_head else 2.0)
        bases = cluster.journal_bases()
        while True:
            swept = sweep_node(bases, joined.endpoint, last)
            quiet = not (swept.alive or swept.failed)
            if quiet or time.monotonic() + LOOK_PAUSE_S > last:
                return _Node(is_head, swept)
            time.sleep(LOOK_PAUSE_S)
    finally:
        ray.shutdown()


def _is_head(node_id: str) -> bool:
    import ray

    return any(
        node["NodeID"] == node_id and "node:__internal_head__" in node["Resources"]
        for node in ray.nodes()
    )


def _of_a_worker(swept: SweepReport) -> Delivery:
    """What lies on this machine only; what the service has is safe on the head's."""
    return Delivery(
        rows=tuple(
            f"the journal of source {source_id[:8]} is not home: {reason}"
            for source_id, reason in sorted(swept.failed.items())
        )
    )
