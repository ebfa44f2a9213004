"""The cluster's part of a delivery: its run is finished, unless others still log.

Everything here calls Ray, so it may take as long as Ray takes.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raywb.errors import NoClusterError, RaywbError, ServiceUnavailable

if TYPE_CHECKING:
    from raywb.reports import FinishReport, SourceStatus

__all__ = ["Finished", "finish_cluster"]

#: Pause before a finish that was not complete is tried again, in seconds.
RETRY_PAUSE_S = 3.0

#: Longest that a job which has just ended may still count as running, in seconds.
JOBS_SETTLE_S = 5.0

#: Longest that is waited for a sign of a process that has not said that it is over, in seconds;
#: one that lives speaks at least so often (see raywb/shipping.py).
SIGN_S = 12.0

#: Pause between two looks, in seconds.
LOOK_PAUSE_S = 0.5

#: raywb's own commands are drivers, too, and log nothing.
_RAYWB = re.compile(
    r"(-m raywb|(^|/)raywb) (watch|status|ui|doctor|drain|report|finish|shutdown)\b"
)


class Finished(NamedTuple):
    """What came of asking the cluster.

    Attributes:
        report: how its run ended; None where none was ended.
        after_finish_rows: rows that came after the end.
        still_logging: who is at work there, each in a sentence.
        stopped: directory of a service that was stopped while the cluster goes on.
        unanswered: why it could not be asked.
    """

    report: FinishReport | None = None
    after_finish_rows: int = 0
    still_logging: tuple[str, ...] = ()
    stopped: Path | None = None
    unanswered: str | None = None


def finish_cluster(
    address: str,
    environment: Mapping[str, str],
    exit_code: int,
    deadline: float,
    tell: Callable[[str], None],
    *,
    though_others_log: bool,
    on_connect: Callable[[], None],
) -> Finished:
    """Ask the cluster to finish its run, again and again until that is complete.

    Args:
        address: the Ray cluster, as for ``ray.init()``.
        environment: this process's.
        exit_code: how the work ended.
        deadline: by ``time.monotonic()``.
        tell: is told what is going on.
        though_others_log: the run is finished though other jobs are at work on the cluster.
        on_connect: called when Ray is connected.
    """
    import ray

    from raywb.launch.connecting import connect_if_alive

    try:
        connect_if_alive(address, environment)
    except NoClusterError as error:
        tell(f"Nothing to deliver from a cluster: {error}")
        return Finished()
    except ServiceUnavailable as error:
        return Finished(unanswered=str(error))
    try:
        on_connect()
        return _finish(exit_code, deadline, tell, though_others_log=though_others_log)
    finally:
        ray.shutdown()


def _finish(
    exit_code: int, deadline: float, tell: Callable[[str], None], *, though_others_log: bool
) -> Finished:
    import raywb
    from raywb.cluster import find_service, service_directory

    if find_service() is None:
        tell("Nothing to deliver from the cluster: no raywb service runs on it")
        return Finished(stopped=service_directory())
    jobs = _jobs_at_work(deadline)
    if jobs and not though_others_log:
        return Finished(still_logging=tuple(jobs))
    report = None
    try:
        while True:
            remaining = max(deadline - time.monotonic(), 1.0)
            report = raywb.finish(timeout_s=remaining, exit_code=exit_code)
            if report.complete or time.monotonic() + RETRY_PAUSE_S > deadline:
                break
            tell(f"Not delivered yet: {report.message}")
            time.sleep(RETRY_PAUSE_S)
        jobs += _processes_at_work(deadline)
        return Finished(report, raywb.status().after_finish_rows, tuple(jobs))
    except RaywbError as error:
        return Finished(report, still_logging=tuple(jobs), unanswered=str(error))


def _jobs_at_work(deadline: float) -> list[str]:
    """Drivers on the cluster, but for this process, those that wait for it, and Ray's own."""
    settled = min(deadline, time.monotonic() + JOBS_SETTLE_S)
    while (jobs := _other_jobs()) and time.monotonic() + LOOK_PAUSE_S < settled:
        time.sleep(LOOK_PAUSE_S)
    return jobs


def _other_jobs() -> list[str]:
    import ray
    from ray._private.worker import global_worker

    own_id = ray.get_runtime_context().get_job_id()
    own_address = ray.util.get_node_ip_address()
    ours = _own_processes()
    found = global_worker.gcs_client.get_all_job_info(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True
    )
    sentences = []
    for job in found.values():
        job_id, where = job.job_id.hex(), job.driver_address.ip_address
        if (
            job.is_dead
            or job_id == own_id
            or job.config.ray_namespace.startswith("_ray_internal")
            or _RAYWB.search(job.entrypoint)
            or (where == own_address and job.driver_pid in ours)
        ):
            continue
        what = f"`{job.entrypoint[:80]}`, " if job.entrypoint else ""
        sentences.append(
            f"another job is at work on the cluster, and what it logs is not all with W&B: job "
            f"{job_id} ({what}process {job.driver_pid} on {where})"
        )
    return sentences


def _processes_at_work(deadline: float) -> list[str]:
    """Processes that have given a sign since the run was finished."""
    import raywb

    host, ours = socket.gethostname(), _own_processes()
    since = time.monotonic()
    until = min(deadline, since + SIGN_S)
    while True:
        sources = [
            one
            for one in raywb.status().sources
            if not (one.ended or (one.hostname == host and one.pid in ours))
        ]
        elapsed_s = time.monotonic() - since
        alive = [
            one for one in sources if one.heard_ago_s is not None and one.heard_ago_s < elapsed_s
        ]
        if len(alive) == len(sources) or time.monotonic() + LOOK_PAUSE_S > until:
            return [_at_work(one) for one in alive]
        time.sleep(LOOK_PAUSE_S)


def _at_work(source: SourceStatus) -> str:
    stages = f" ({', '.join(source.stages[:3])})" if source.stages else ""
    return (
        f"process {source.pid} on {source.hostname}{stages} lives, and may log what nobody "
        "delivers any more"
    )


def _own_processes() -> set[int]:
    """This process, and those that wait for it, since they started it."""
    import psutil

    return {os.getpid(), *(one.pid for one in psutil.Process().parents())}
