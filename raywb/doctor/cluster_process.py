"""Asks a Ray cluster: ``python -m raywb.doctor.cluster_process``.

This is a process of its own: to an address where nobody answers, ``ray.init`` waits for minutes,
cannot be interrupted, and may end its process. It reads a :class:`ClusterRequest`, one JSON line,
from stdin, and writes to stdout what it learns, one JSON line each.

Each node gets two tasks that need no CPU, one after the other: they set the idle time back, once,
that Ray's autoscaler goes by.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from typing import IO, Any

import msgspec

from raywb.doctor.look import (
    ClusterRequest,
    Connected,
    Line,
    NodeLook,
    Nodes,
    NotConnected,
    ServiceLook,
)
from raywb.errors import RaywbError

__all__ = ["main", "refusal"]

#: Longest that all clocks may take to be read, in seconds.
CLOCKS_S = 15.0

#: Errors that led to one another, of which Ray tells the last.
MOST_CAUSES = 10

#: Longest that Ray's state API may take, in seconds.
STATE_API_S = 10


def main() -> None:
    """Answer one request."""
    # Ray and its workers print what they like.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=ClusterRequest)
    refused = _connect(request.address)
    if refused is not None:
        _tell(answers, refused)
        return
    import ray

    _tell(
        answers,
        Connected(
            address=ray.get_runtime_context().gcs_address,
            ray_version=ray.__version__,
            available_cpus=float(ray.available_resources().get("CPU", 0.0)),
            state_api_error=_state_api_error(request.address),
        ),
    )
    service = _look_at_service()
    _tell(answers, service)
    _tell(answers, _look_at_nodes(request, service))


def _tell(answers: IO[bytes], line: Line) -> None:
    answers.write(msgspec.json.encode(line) + b"\n")


def _connect(address: str) -> NotConnected | None:
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        return refusal(error)
    return None


def refusal(error: BaseException) -> NotConnected:
    """Which of the known troubles it is that Ray describes, in an error or in what led to it."""
    text = " ".join(str(error).split())[:300]
    told, cause = "", error
    for _ in range(MOST_CAUSES):
        told += f" {type(cause).__name__}: {cause}"
        following = cause.__cause__ or cause.__context__
        if following is None:
            break
        cause = following
    return NotConnected(kind=_kind(told), text=text)


def _kind(text: str) -> str:
    if "AuthenticationError" in text or "InvalidAuthToken" in text:
        return "authentication"
    if "ersion mismatch" in text:
        return "version"
    if "Could not find any running Ray" in text:
        return "none"
    return "several" if "multiple active Ray" in text else "other"


def _state_api_error(address: str) -> str | None:
    """Why Ray's state API gives no answer, or None; from outside it cannot always be reached."""
    if address.startswith("ray://"):
        return None
    import ray
    from ray.util.state import list_actors

    gcs_address = ray.get_runtime_context().gcs_address
    try:
        list_actors(
            address=gcs_address, limit=1, timeout=STATE_API_S, raise_on_missing_output=False
        )
    except Exception as error:  # noqa: BLE001 - whatever it raises, it does not answer
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0][:200]
    return None


def _look_at_service() -> ServiceLook:
    import raywb
    from raywb.cluster import find_service

    if find_service() is None:
        return ServiceLook()
    try:
        return ServiceLook(status=raywb.status())
    except RaywbError as error:
        return ServiceLook(error=str(error))
    except Exception as error:  # noqa: BLE001 - what another version answers may be anything
        return ServiceLook(error=f"{type(error).__name__}: {error}"[:300])


def _look_at_nodes(request: ClusterRequest, service: ServiceLook) -> Nodes:
    from ray import cloudpickle

    from raywb.doctor import on_node
    from raywb.nodes.probe import ProbeResult, look_at_nodes, probe_nodes

    cloudpickle.register_pickle_by_value(on_node)
    seen = {node.node_id: node for node in look_at_nodes()}
    asked = _asked(request, service)
    asked["head"] = next((id_ for id_, node in seen.items() if node.is_head), None)
    examine, tell_time = on_node.examine, on_node.tell_time
    group_name = f"raywb-doctor-{uuid.uuid4().hex}"
    results: dict[str, ProbeResult] = {}
    probe_nodes(
        seen,
        request.nodes_limit_s,
        results.__setitem__,
        probe=lambda: examine(asked),
        group_name=group_name,
    )
    # By now each node has a worker that waits: its answer takes no longer than the way does.
    answered = [id_ for id_, result in results.items() if result.facts is not None]
    clocks: dict[str, tuple[float, float]] = {}
    sent_s = time.time()

    def take_clock(node_id: str, result: ProbeResult) -> None:
        if result.facts is not None:
            came_s, time_s = time.time(), float(result.facts["time_s"])
            clocks[node_id] = (time_s - (sent_s + came_s) / 2, (came_s - sent_s) / 2)

    probe_nodes(answered, CLOCKS_S, take_clock, probe=lambda: tell_time(), group_name=group_name)
    nodes, unanswered = [], {}
    for node_id, result in results.items():
        node = seen[node_id]
        name = node.hostname or node.ip
        if result.facts is None:
            unanswered[f"{name} {node_id[:8]}"] = result.error or "no answer"
            continue
        ahead_s, error_s = clocks.get(node_id, (None, 0.0))
        told: dict[str, Any] = {
            "node_id": node_id,
            "name": name,
            "is_head": node.is_head,
            "cpus": node.resources.get("CPU", 0.0),
            "gpus": node.resources.get("GPU", 0.0),
            "clock_ahead_s": ahead_s,
            "clock_error_s": error_s,
            **result.facts,
        }
        nodes.append(msgspec.convert(told, NodeLook))
    return Nodes(nodes=sorted(nodes, key=lambda one: not one.is_head), unanswered=unanswered)


def _asked(request: ClusterRequest, service: ServiceLook) -> dict[str, Any]:
    """What each node is asked; of W&B, what concerns the run that there is."""
    wandb = request.wandb
    directory = None
    if service.status is not None:
        run = service.status.run
        directory = run.dir
        wandb = msgspec.structs.replace(
            wandb,
            entity=run.entity,
            project=run.project,
            run_id=run.id if run.mode == "online" else None,
            ask_server=wandb.ask_server or run.mode == "online",
        )
    return {
        "variables": request.variables,
        "modules": request.modules,
        "directory": directory,
        "wandb": msgspec.to_builtins(wandb),
    }


if __name__ == "__main__":
    main()
