"""``start``, ``attach``, ``status`` and ``finish``: the life of the cluster's run."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, NamedTuple

import ray

from raywb import cluster as ray_side
from raywb.children import export_group
from raywb.client import Client
from raywb.errors import NoClusterError, ServiceUnavailable, SettingsError
from raywb.groups import Group, resolve_group
from raywb.own_runs import check_own_run, log_metadata, open_own_run
from raywb.reports import FinishReport, PageAddress, RunInfo, Status
from raywb.settings import (
    Settings,
    explicit_settings,
    find_api_key,
    process_environment,
    resolve,
)
from raywb.sweep import sweep_cluster
from raywb.this_process import connection_for, present_connection, source_id_for

__all__ = [
    "attach",
    "attach_for_callback",
    "attach_own_run",
    "finish",
    "page_address",
    "running_client",
    "start",
    "status",
]

_log = logging.getLogger("raywb")

#: Longest that ``start()`` waits for the service to come up, in seconds; W&B is not waited for.
START_TIMEOUT_S = 60.0

#: Longest that ``attach()`` waits for a service that is being made or restarted, in seconds.
ATTACH_TIMEOUT_S = 30.0


class _Origin(NamedTuple):
    """What a caller brings to the service: settings, its own group, and W&B's key if it has it."""

    settings: Settings
    group: Group
    api_key: str | None


def _origin(settings: Settings, cluster: ray_side.Cluster) -> _Origin:
    """Look around in this process, which may be the only one that has group or key."""
    group = resolve_group(
        settings.group, cluster.cluster_id, process_environment(), cluster.submission_id
    )
    online = settings.mode not in ("offline", "disabled")
    return _Origin(settings, group, find_api_key(settings) if online else None)


def start(settings: Settings | None = None, /, *, cfg: Any = None, **overrides: Any) -> RunInfo:
    """Create the cluster's service and open its run, or join the one that is open.

    Calling it again with the same settings changes nothing. After ``finish()`` it opens a new
    run in the same service. It does not wait for W&B.

    The driver whose call opens the run owns it until ``finish()``, as long as no other Ray job
    has attached to it. When it ends without ``finish()``:

    - by an exception that nobody caught, or ``sys.exit`` with a code: the run is ended as failed;
    - killed: its rows are brought to W&B, which then shows the run as crashed; whoever attaches
      to it later brings it back;
    - in good order: on a cluster that it started itself the run is finished, as W&B's own client
      would do it; on one that was there before, the run stays open for other jobs.

    Once another job has attached, the run stays open whatever happens to the first driver.

    The run's group is exported as ``WANDB_GROUP``, so that what this process launches inherits
    it, and so does a later ``start()`` that names none. No other variable is written.

    Args:
        settings: see :class:`Settings`.
        cfg: an OmegaConf or Hydra config, or a mapping, with a ``wandb`` section.
        **overrides: single settings by name, for instance ``project="pretrain"``.

    Raises:
        SettingsError: a setting is unknown or cannot be used.
        SettingsConflict: the open run has other settings than these.
        NoClusterError: there is no Ray cluster, and ``local_cluster`` is not set.
        ServiceUnavailable: the service did not come up in time.
    """
    resolved = resolve(settings, cfg=cfg, overrides=overrides)
    named = explicit_settings(settings, cfg=cfg, overrides=overrides)
    explicit = {key: getattr(resolved, key) for key in named}
    cluster = ray_side.connect(local_cluster=resolved.local_cluster)
    origin = _origin(resolved, cluster)
    service = ray_side.find_service() or ray_side.make_service(cluster, *origin)
    ray_side.join(service, cluster, timeout_s=START_TIMEOUT_S)
    run, joined = ray_side.call(
        service, "start", resolved, explicit, *origin[1:], timeout_s=START_TIMEOUT_S
    )
    if not joined and cluster.is_driver:
        endpoint = ray_side.join(service, cluster, timeout_s=START_TIMEOUT_S).endpoint
        connection_for(cluster, endpoint, run.epoch).own(run)
    _say_started(run, joined=joined)
    if not joined:
        announced = ray_side.join(service, cluster, timeout_s=START_TIMEOUT_S)
        say_line(log_metadata(_open_client(cluster, announced, None, None, None), cfg))
    hand_down_group(run)
    return run  # type: ignore[no-any-return]


def _say_started(run: RunInfo, *, joined: bool) -> None:
    what = {
        "online": "ONLINE - real-time syncing",
        "offline": f"OFFLINE - upload later with: wandb sync {run.dir}/wandb/offline-run-*",
        "disabled": "DISABLED - nothing is sent to W&B",
    }[run.mode]
    if joined:
        say(f"Joined run: {run.name} (mode={run.mode}, dir={run.dir})")
        return
    say(f"Starting run: {run.name} (mode={run.mode}, dir={run.dir})")
    say(f"Run group: {run.group or '(none)'}")
    say(f"✓ Run started: {run.name} ({what})")


def hand_down_group(run: RunInfo) -> None:
    """Let what this process launches inherit the run's group, and say so."""
    if export_group(run):
        say_line(f"[orchestrator] Setting WANDB_GROUP={run.group} for child stages")


def say(text: str) -> None:
    """One line for the person at the terminal."""
    say_line(f"[raywb] {text}")


def say_line(line: str) -> None:
    """The same of a line that says already from whom it is."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def attach(
    stage: str | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    own_run: bool = False,
    run_id: str | None = None,
    cfg: Any = None,
    strict: bool = False,
) -> Client:
    """Get a client of the cluster's run, in any Ray task, actor or driver.

    Without a service one is made; it takes rows at once, and opens its run when a ``start()``
    brings settings, or after a short while with the defaults.

    With ``own_run`` the stage has a W&B run of its own, beside the cluster's and in its group: its
    job type is the stage, its keys carry no prefix, and its config says what this job was given.
    It ends when its clients are closed (as failed, when an exception leaves their ``with``
    block), as crashed when a process that was attached to it is killed, and with ``finish()`` at
    the latest.

    Args:
        stage: prefix of all keys, for instance ``training/operator``.
        rank: this worker's rank among those that log the stage.
        world_size: how many there are.
        own_run: give the stage a run of its own.
        run_id: W&B's id of that run; processes that name the same one share it, and one that
            has ended is opened again.
        cfg: config with a ``wandb`` section, for the service that may have to be made, and for
            the stage's own run; what the run's config takes from it is in
            :func:`raywb.collect_compute_metadata`.
        strict: ``log()`` raises for a value that cannot be charted.

    Raises:
        NoClusterError: there is no Ray cluster; ``ray.init()`` or ``raywb.start`` comes first.
        SettingsError: ``stage``, ``rank``, ``run_id`` or ``cfg`` cannot be used.
        SettingsConflict: ``run_id`` is the id of another kind of run, or the cluster's run is
            finished, and ``own_run`` is asked for.
        VersionMismatch: the service speaks another protocol.
    """
    ranks = rank, world_size
    return _attach(stage, ranks, own_run=own_run, run_id=run_id, cfg=cfg, strict=strict)


def attach_for_callback(stage: str, *, timeout_s: float) -> Client:
    """As ``attach(stage)``, where Ray's own loop waits for it: for at most ``timeout_s``."""
    return _attach(stage, (None, None), own_run=False, run_id=None, timeout_s=timeout_s)


def attach_own_run(stage: str, *, run_id: str, name: str, timeout_s: float) -> Client:
    """The same with ``own_run=True`` and ``run_id``, for a run that has a name already.

    What this process was given does not go into its config: it is another one's run.
    """
    return _attach(stage, (None, None), own_run=True, run_id=run_id, name=name, timeout_s=timeout_s)


def _attach(
    stage: str | None,
    ranks: tuple[int | None, int | None],
    *,
    own_run: bool,
    run_id: str | None,
    cfg: Any = None,
    strict: bool = False,
    name: str | None = None,
    timeout_s: float = ATTACH_TIMEOUT_S,
) -> Client:
    deadline = time.monotonic() + timeout_s
    stage, (rank, world_size) = _checked_stage(stage), ranks
    _check_rank(rank, world_size)
    check_own_run(stage, run_id, own_run=own_run)
    cluster = ray_side.connect()
    service = ray_side.find_service()
    is_first = service is None
    if service is None:
        service = ray_side.make_service(cluster, *_origin(resolve(cfg=cfg), cluster))
    joined = ray_side.join(service, cluster, timeout_s=timeout_s, source_id=source_id_for(cluster))
    if is_first:
        log_metadata(_open_client(cluster, joined, None, None, None), cfg)
    if own_run and stage is not None:
        limit_s = max(deadline - time.monotonic(), timeout_s / 2)
        run, session = open_own_run(service, stage, run_id, cfg, timeout_s=limit_s, name=name)
        connection = connection_for(cluster, joined.endpoint, joined.epoch)
        channel = connection.open_channel(stage, rank, world_size, own_run=(run.epoch, session))
        client = Client(connection, channel, stage, run, strict=strict)
        _say_started(run, joined=False)
        if name is None:
            say_line(log_metadata(client, cfg))
        return client
    if joined.finished:
        _log.warning(
            "raywb: run %s is finished; rows logged from here on wait for the next raywb.start()",
            joined.run.name,
        )
    return _open_client(cluster, joined, stage, rank, world_size, strict=strict)


def _open_client(
    cluster: ray_side.Cluster,
    joined: ray_side.Joined,
    stage: str | None,
    rank: int | None,
    world_size: int | None,
    *,
    strict: bool = False,
) -> Client:
    connection = connection_for(cluster, joined.endpoint, joined.epoch)
    channel = connection.open_channel(stage, rank, world_size)
    return Client(connection, channel, stage, joined.run, strict=strict)


def running_client() -> Client | None:
    """A client without a stage when this cluster's service runs; never makes or starts anything."""
    if not ray.is_initialized():
        return None
    service = ray_side.find_service()
    if service is None:
        return None
    cluster = ray_side.connect()
    joined = ray_side.join(
        service, cluster, timeout_s=ATTACH_TIMEOUT_S, source_id=source_id_for(cluster)
    )
    return _open_client(cluster, joined, None, None, None)


def _checked_stage(stage: str | None) -> str | None:
    if stage is None:
        return None
    name = stage.strip("/") if isinstance(stage, str) else ""
    if not name or len(name) > 256 or not name.isprintable() or "*" in name:
        raise SettingsError(
            f"stage={stage!r} cannot be used: it is a printable name such as 'training/operator', "
            "of at most 256 characters, without '*'"
        )
    return name


def _check_rank(rank: int | None, world_size: int | None) -> None:
    if rank is None and world_size is None:
        return
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise SettingsError(
            f"rank={rank!r}, world_size={world_size!r} cannot be used: they come together, "
            "with 0 <= rank < world_size"
        )


def _service() -> Any:
    ray_side.connect()
    service = ray_side.find_service()
    if service is None:
        raise ServiceUnavailable(
            "no raywb service runs on this Ray cluster: raywb.start() or raywb.attach() makes one"
        )
    return service


def status(*, timeout_s: float = 15.0) -> Status:
    """What the service knows of itself, its run and its sources.

    Raises:
        NoClusterError: there is no Ray cluster.
        ServiceUnavailable: no service runs on it, or it does not answer.
    """
    answer: Status = ray_side.call(_service(), "status", timeout_s=timeout_s)
    return answer


def page_address(*, timeout_s: float = 15.0) -> PageAddress:
    """Where the service shows its page; raises what :func:`status` does."""
    answer: PageAddress = ray_side.call(_service(), "page_address", timeout_s=timeout_s)
    return answer


def finish(*, timeout_s: float = 300.0, exit_code: int = 0) -> FinishReport:
    """End the cluster's run: take in what is still in journals, deliver it, close the run.

    It never hangs: at the limit the report says what is not with W&B, where it lies, and that
    ``raywb sync DIR`` delivers it. A second call after a complete one returns the same report;
    after one that was not, it takes in what it can reach now, and tries again.

    Args:
        timeout_s: longest that all of it may take.
        exit_code: 0 for success; anything else marks the run as failed.

    Raises:
        NoClusterError: there is no Ray cluster.
        ServiceUnavailable: no service runs on it, or it does not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    service = _service()
    cluster = ray_side.connect()
    joined = ray_side.join(service, cluster, timeout_s=timeout_s)
    if (connection := present_connection()) is not None:
        connection.flush(min(timeout_s / 4, 10.0))
    swept = None
    sweeping_until = time.monotonic() + timeout_s / 4
    # What a sweep does not bring home before the cut belongs to the next run. The service may
    # be killed under it, or still be starting: then the next incarnation is swept for.
    while not joined.complete:
        before = joined
        if joined.endpoint is not None:
            outstanding = ray_side.call(service, "outstanding", timeout_s=timeout_s / 4)
            limit_s = min(timeout_s / 4, 60.0)
            swept = sweep_cluster(cluster, joined.endpoint, limit_s, outstanding)
            if not swept.failed and not swept.unreached:
                break
        if time.monotonic() > sweeping_until:
            break
        remaining = max(deadline - time.monotonic(), 1.0)
        joined = ray_side.join(service, cluster, timeout_s=remaining)
        if joined.endpoint is not None and joined.incarnation == before.incarnation:
            break  # it was there all the time: another sweep would find the same
    remaining = max(deadline - time.monotonic(), 1.0)
    report: FinishReport = ray_side.call(
        service, "finish", remaining, exit_code, swept, timeout_s=remaining + 10.0
    )
    if connection is not None:
        connection.disown()
    return report


def stop_service() -> None:
    """End the service's actor; what it holds stays on disk.

    Raises:
        NoClusterError: there is no Ray cluster.
    """
    if not ray.is_initialized():
        raise NoClusterError("there is no Ray cluster whose raywb service could be stopped")
    service = ray_side.find_service()
    if service is not None:
        ray.kill(service, no_restart=True)
