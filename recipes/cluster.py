"""The Ray cluster of a recipe: the one that is there, or a local one for the time of the recipe.

A cluster is there when Ray is initialised in this process, when ``RAY_ADDRESS`` names one, or when
this process is the driver of a Ray job. Otherwise a local one is started that listens on 127.0.0.1
only, and another cluster that happens to run on the machine is left alone.

A cluster with an autoscaler is asked for the CPUs that are missing, for the time of the recipe.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil
import ray
import ray.util.state
from ray.exceptions import RayError
from ray.util.state.exception import RayStateApiException

from recipes.autoscaling import autoscaler_is_there, bring_cpus, release_nodes
from recipes.errors import ClusterError
from recipes.local_ray import (
    XENNA_ACTOR_LIMIT,
    XENNA_ENVIRONMENT,
    cluster_is_there,
    prepare_environment,
)
from recipes.nodes import CLUSTER_GONE, run_on_nodes
from recipes.settings import Count

__all__ = ["RayCluster", "RaySettings", "leave_pipeline", "ray_cluster"]

_log = logging.getLogger(__name__)

#: Logical CPUs of a local cluster at least: xenna's monitor takes one per node, each worker of a
#: stage a half or a whole one, and most of them wait rather than compute.
_LOCAL_CPUS = 8

#: What PlanStage, DownloadStage and one tokenizing worker take together, beside one CPU per node.
_PIPELINE_CPUS = 2

#: xenna's actors: one per node, and one per worker of a stage.
_XENNA_ACTORS = ("NodeResourceMonitor", "StageWorker")

#: How long processes of a local cluster may take to end by themselves.
_SHUTDOWN_S = 1.0


@dataclass(frozen=True)
class RaySettings:
    """How a local cluster is started, or how many CPUs an autoscaler is to bring."""

    num_cpus: Count | None
    log_to_driver: bool


@dataclass(frozen=True)
class RayCluster:
    """The cluster that the recipe runs on."""

    started_here: bool
    num_cpus: int
    nodes: int


@contextlib.contextmanager
def ray_cluster(
    settings: RaySettings, announce: Callable[[str], None] = _log.info
) -> Iterator[RayCluster]:
    """Connect to the cluster that is there, or start a local one and end it on leaving.

    Args:
        settings: How many CPUs it is to have.
        announce: Is told when nodes of an autoscaled cluster are waited for.

    Raises:
        ClusterError: The cluster lacks what cosmos-xenna needs; the message says what.
    """
    if ray.is_initialized():
        with _named_in_environment(), _grown(settings, announce):
            yield _checked(settings, started_here=False)
        return
    started_here = not cluster_is_there()
    try:
        if started_here:
            _start_local(settings)
        else:
            ray.init(log_to_driver=settings.log_to_driver)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = "start a local Ray cluster" if started_here else "connect to the Ray cluster"
        raise ClusterError(f"cannot {what}: {error}") from error
    try:
        with _named_in_environment(), _grown(settings, announce):
            yield _checked(settings, started_here)
    finally:
        _shut_down(started_here)


def _shut_down(started_here: bool) -> None:
    """Leave the cluster, or end it with every process of it.

    Why: xenna's actors hold threads that never end, so some of them outlive their job, and even
    their cluster, and go on using the processor (seen with 0.3.0 and 0.5.12, Ray 2.60).
    """
    processes: list[psutil.Process] = []
    if started_here:  # found as descendants of this process, as long as the cluster is up
        processes = psutil.Process().children(recursive=True)
    else:
        _end_xenna_actors()
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_SHUTDOWN_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_SHUTDOWN_S)


def _end_xenna_actors() -> None:
    """End what xenna's actors of this job left on each node of a cluster that goes on.

    xenna has killed its workers by now, and leaves looking after them to tasks that end with the
    job; Ray takes its word for dead ones too, hence all are asked for, whatever their state.
    """
    mine = ("job_id", "=", ray.get_runtime_context().get_job_id())
    pids: dict[str, list[int]] = {}
    try:
        for name in _XENNA_ACTORS:
            for actor in ray.util.state.list_actors(
                filters=[mine, ("class_name", "=", name)], limit=XENNA_ACTOR_LIMIT
            ):
                if actor.pid and actor.node_id:
                    pids.setdefault(actor.node_id, []).append(actor.pid)
    except CLUSTER_GONE as error:
        _log.warning("cannot ask for left-over processes: %s", error)
    run_on_nodes({node_id: (_end_processes, found) for node_id, found in pids.items()})


def _end_processes(pids: Sequence[int]) -> None:
    # An actor at work has the name of its method behind that of its class.
    titles = tuple(f"ray::{name}" for name in _XENNA_ACTORS)
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.cmdline()[:1] and process.cmdline()[0].startswith(titles):
                process.kill()


@contextlib.contextmanager
def _named_in_environment() -> Iterator[None]:
    """Keep this cluster's address in ``RAY_ADDRESS``.

    xenna asks Ray's state API without saying of which cluster, and Ray then looks for any cluster
    on the machine: with two of them it refuses, or asks the wrong one.
    """
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def _start_local(settings: RaySettings) -> None:
    prepare_environment()  # for callers other than a recipe's __main__, as far as it still helps
    ray.init(
        address="local",
        num_cpus=settings.num_cpus or max(_LOCAL_CPUS, os.cpu_count() or 1),
        include_dashboard=True,  # xenna asks the state API, which is part of it
        dashboard_host="127.0.0.1",
        log_to_driver=settings.log_to_driver,
    )


@contextlib.contextmanager
def _grown(settings: RaySettings, announce: Callable[[str], None]) -> Iterator[None]:
    """Have an autoscaler bring the CPUs that are missing, and let it take them away afterwards."""
    if not autoscaler_is_there():
        yield
        return
    bring_cpus(settings.num_cpus or 1, announce)
    # A node that comes has a monitor, too.
    while (cluster := _described(started_here=False)).num_cpus < _needed(cluster):
        bring_cpus(_needed(cluster), announce)
    try:
        yield
    finally:
        _let_nodes_go()


def _let_nodes_go() -> None:
    try:
        release_nodes()
    except CLUSTER_GONE as error:
        _log.warning("cannot tell the autoscaler that the nodes may go: %s", error)


def leave_pipeline() -> None:
    """End what xenna left running, and let nodes go that came for the pipeline alone."""
    _end_xenna_actors()
    if autoscaler_is_there():
        _let_nodes_go()


def _described(started_here: bool) -> RayCluster:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return RayCluster(started_here, int(ray.cluster_resources().get("CPU", 0)), len(nodes))


def _needed(cluster: RayCluster) -> int:
    return cluster.nodes + _PIPELINE_CPUS


def _checked(settings: RaySettings, started_here: bool) -> RayCluster:
    """Describe the cluster, after making sure that the pipeline can run on it."""
    cluster, autoscaled = _described(started_here), autoscaler_is_there()
    if not started_here and not autoscaled and settings.num_cpus is not None:
        raise ClusterError(
            "ray.num_cpus has no effect here, because there is a Ray cluster already, and no "
            "autoscaler that could bring more; leave it out"
        )
    needed = _needed(cluster)
    if cluster.num_cpus < needed:
        raise ClusterError(
            f"the Ray cluster has {cluster.num_cpus} CPUs, and the pipeline needs {needed}: one "
            f"per node for cosmos-xenna's monitor and {_PIPELINE_CPUS} for the stages; these are "
            "logical CPUs, so a small machine may be started with a higher --num-cpus"
        )
    if not started_here:
        _check_state_api()
        _check_imports()
    return cluster


def _check_state_api() -> None:
    """Ask what xenna will ask; a cluster started without the limits refuses."""
    try:
        ray.util.state.list_actors(limit=XENNA_ACTOR_LIMIT, filters=[("state", "=", "ALIVE")])
    except (RayStateApiException, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if "exceeds the supported limit" not in reason:
            raise ClusterError(
                "cosmos-xenna needs Ray's state API, and it does not answer; start the head with "
                f"--include-dashboard=true, with ray[default] installed ({reason})"
            ) from error
        variables = " ".join(f"{name}={value}" for name, value in XENNA_ENVIRONMENT.items())
        raise ClusterError(
            "the Ray cluster refuses what cosmos-xenna asks of it; start the head and the workers "
            f"with {variables} in their environment ({reason})"
        ) from error


def _check_imports() -> None:
    """Let a worker import the stages, so that what is missing there is known by name."""
    try:
        ray.get(ray.remote(num_cpus=0)(_import_stages).remote())
    except RayError as error:
        last_line = str(error).strip().splitlines()[-1]
        raise ClusterError(
            "the cluster's workers cannot import the recipe's stages; install raywb[recipes] there "
            f"or submit the job with --working-dir ({last_line})"
        ) from error


def _import_stages() -> None:
    import recipes.pipeline
    import recipes.stages.download
    import recipes.stages.tokenizer  # noqa: F401
