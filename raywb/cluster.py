"""The Ray side of the client: which cluster this is, and where its service runs.

This is the only module that makes Ray calls for a client, always in the thread of whoever
called ``start``, ``attach``, ``flush``, ``status`` or ``finish``, and the only one that knows
both the client and the service.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from raywb.errors import NoClusterError, RaywbError, ServiceUnavailable, VersionMismatch
from raywb.groups import Group
from raywb.reports import RunInfo
from raywb.rows import PROTOCOL
from raywb.settings import Settings, default_dir, journal_bases, process_environment
from raywb.shipping import Endpoint

__all__ = [
    "Cluster",
    "Joined",
    "call",
    "connect",
    "find_service",
    "join",
    "make_service",
    "present_run",
    "service_directory",
]

ACTOR_NAME = "raywb"
NAMESPACE = "raywb"

#: Under this key Ray's control store remembers the service's directory, as long as the cluster
#: lives.
DIRECTORY_KEY = b"raywb:directory"

#: Calls that run at the same time in the actor; a finish may wait for minutes in one of them.
MAX_CONCURRENCY = 32

#: Longest that a join waits for a service that does not listen yet, in seconds.
JOIN_WAIT_S = 5.0

#: Pause before a call to a restarting actor is tried again, in seconds.
RETRY_PAUSE_S = 0.25


class Cluster(NamedTuple):
    """The Ray cluster that this process is part of.

    Attributes:
        session_dir: Ray's directory on this node; None for a process outside of the cluster.
        is_driver: this process is a job's driver.
        started_here: it started the cluster, which ends with it.
        submission_id: of the Ray job that this process belongs to, if it was submitted as one.
    """

    cluster_id: str
    node_id: str
    session_dir: str | None
    job_id: str = ""
    is_driver: bool = False
    started_here: bool = False
    submission_id: str | None = None

    @property
    def is_worker(self) -> bool:
        """Whether Ray started this process for a job, which may have many of them."""
        return not self.is_driver and self.session_dir is not None

    def journal_bases(self) -> list[Path]:
        """Directories on this machine where processes of this cluster keep their journals."""
        return journal_bases(self.session_dir, self.cluster_id)


class Joined(NamedTuple):
    """What the service tells a client that joins."""

    endpoint: Endpoint | None
    run: RunInfo
    epoch: int
    finished: bool
    complete: bool = False
    incarnation: int = 0


def connect(*, local_cluster: bool = False) -> Cluster:
    """The cluster of this process; connects to a running one when it has none yet.

    Args:
        local_cluster: start one on this machine when there is none.

    Raises:
        NoClusterError: there is none, and none may be started.
    """
    if not ray.is_initialized():
        try:
            ray.init(address="auto")
        except ConnectionError as error:
            if not (local_cluster and _none_was_found(error)):
                raise NoClusterError(
                    f"there is no Ray cluster to attach to ({_first_sentence(error)}). Start one "
                    "with `ray start --head`, call ray.init() first, or allow one on this machine "
                    "with raywb.start(local_cluster=True)"
                ) from error
            ray.init(address="local")
    return _present_cluster()


def _none_was_found(error: ConnectionError) -> bool:
    """Whether there is no cluster; one that was named and does not answer is not the same."""
    named = process_environment().get("RAY_ADDRESS")
    return not named and "Could not find any running Ray" in str(error)


def _first_sentence(error: Exception) -> str:
    """What Ray said: several clusters, or one that does not answer, is not the same as none."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")


def _last_line(error: Exception) -> str:
    """What a long report of Ray's comes down to: the exception at its end."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [""])[-1]


def _present_cluster() -> Cluster:
    context = ray.get_runtime_context()
    worker = ray._private.worker.global_worker
    node = getattr(worker, "node", None)
    if node is None:  # Ray Client: this process is outside the cluster
        cluster_id = ray.get(ray.remote(_cluster_id).options(num_cpus=0).remote())
        return Cluster(cluster_id, context.get_node_id(), None)
    return Cluster(
        node.cluster_id.hex(),
        context.get_node_id(),
        node.get_session_dir_path(),
        job_id=context.get_job_id(),
        is_driver=worker.mode == ray._private.worker.SCRIPT_MODE,
        started_here=bool(node.head),
        # Workers have it nowhere else: only the driver's environment tells of it.
        submission_id=worker.core_worker.get_job_config().metadata.get("job_submission_id"),
    )


def _dashboard() -> str | None:
    """Address of Ray's dashboard; None where it has none, or this process does not know it."""
    node = getattr(ray._private.worker.global_worker, "node", None)
    address = getattr(node, "webui_url", None)
    if not address:
        return None
    return address if "://" in address else f"http://{address}"


def _cluster_id() -> str:
    cluster_id: str = ray._private.worker.global_worker.node.cluster_id.hex()
    return cluster_id


def find_service() -> Any | None:
    """A handle of the cluster's service, or None."""
    try:
        return ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return None


def present_run(*, timeout_s: float) -> RunInfo | None:
    """The run of this process's cluster; None where Ray is not up, or no service runs.

    Raises:
        ServiceUnavailable: a service runs, and does not answer within ``timeout_s``.
    """
    service = find_service() if ray.is_initialized() else None
    return join(service, _present_cluster(), timeout_s=timeout_s).run if service else None


def make_service(
    cluster: Cluster,
    settings: Settings,
    group: Group,
    api_key: str | None,
) -> Any:
    """Make the service on the head node, or find the one that somebody else just made."""
    from raywb.service.actor import Boot, RaywbService
    from raywb.service.ray_metrics_sink import RayGauges
    from raywb.service.run_settings import new_run_id
    from raywb.sweep import RayNodes

    run_id = settings.run_id or new_run_id()
    boot = Boot(
        directory=_directory_of_the_service(settings, run_id),
        cluster_id=cluster.cluster_id,
        run_id=run_id,
        host=settings.listen_host or _head_address(),
        settings=settings,
        group=group,
        session_dir=cluster.session_dir,
        dashboard=_dashboard(),
    )
    return (
        ray.remote(RaywbService)
        .options(
            name=ACTOR_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            # The label that only the head node has; so little of it that any number would fit.
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
            max_concurrency=MAX_CONCURRENCY,
        )
        .remote(boot, api_key, RayNodes(), RayGauges())
    )


def _directory_of_the_service(settings: Settings, run_id: str) -> str:
    """Where the cluster's service works: where an earlier one did, unless the settings say.

    Journals on the nodes outlive a service, and only the ledger that took their bytes knows how
    much of them it has: a service with an empty one would take everything again.
    """
    wanted = str(default_dir(settings, run_id)).encode()
    # Of several who make it at once, the first decides for all.
    _internal_kv_put(DIRECTORY_KEY, wanted, overwrite=settings.dir is not None)
    return (_internal_kv_get(DIRECTORY_KEY) or wanted).decode()


def service_directory() -> Path | None:
    """Where the service of this cluster works, or worked before it was stopped."""
    known = _internal_kv_get(DIRECTORY_KEY)
    return Path(known.decode()) if known else None


def _head_address() -> str:
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return str(node["NodeManagerAddress"])
    raise NoClusterError("the Ray cluster has no head node that is alive; start it again")


def call(service: Any, method: str, *args: Any, timeout_s: float) -> Any:
    """Call the service and wait; a restart in between is waited for.

    Raises:
        RaywbError: what the service raised.
        ServiceUnavailable: no answer within ``timeout_s``, or the actor is gone for good.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        remaining = max(deadline - time.monotonic(), 0.1)
        try:
            return ray.get(getattr(service, method).remote(*args), timeout=remaining)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaywbError):
                raise error.cause from None
            raise
        except ray.exceptions.GetTimeoutError:
            reason = "it did not answer"
        except ray.exceptions.ActorDiedError as error:
            # Unlike one that restarts, it is gone for good: waiting would help nobody.
            raise ServiceUnavailable(
                f"the raywb service is gone: {_last_line(error)}. raywb.start() makes another; "
                "rows that were logged are safe on disk"
            ) from error
        except ray.exceptions.RayActorError as error:
            # Restarting: pending calls fail at once, later ones reach the new incarnation.
            reason = str(error).splitlines()[0]
            time.sleep(RETRY_PAUSE_S)
        if time.monotonic() >= deadline:
            raise ServiceUnavailable(
                f"the raywb service could not be asked for {method!r} within {timeout_s:g} s: "
                f"{reason}. `raywb status` tells more; rows that were logged are safe on disk"
            )


def join(
    service: Any, cluster: Cluster, *, timeout_s: float, source_id: str | None = None
) -> Joined:
    """Ask the service for its address and its run.

    Args:
        service: the service's handle.
        cluster: this process's cluster.
        timeout_s: longest that it may take.
        source_id: announces the caller as this source, which is about to write.

    Raises:
        VersionMismatch: it speaks another protocol.
        ServiceUnavailable: no answer within ``timeout_s``.
    """
    from raywb import __version__

    announced = (source_id, cluster.node_id) if source_id is not None else None
    answer = call(service, "join", PROTOCOL, JOIN_WAIT_S, announced, timeout_s=timeout_s)
    if answer["protocol"] != PROTOCOL:
        raise VersionMismatch(
            f"this process has raywb {__version__} (protocol {PROTOCOL}), the service on this "
            f"cluster raywb {answer['version']} (protocol {answer['protocol']}): install the "
            "same version on both sides, or end the service with `raywb finish --stop`"
        )
    endpoint = None
    if answer["address"] is not None:
        endpoint = Endpoint(
            address=answer["address"], token=answer["token"], cluster_id=cluster.cluster_id
        )
    return Joined(
        endpoint,
        answer["run"],
        answer["epoch"],
        answer["finished"],
        answer.get("complete", False),
        answer.get("incarnation", 0),
    )
