"""The collector as a detached Ray actor beside the service: on the head node, at zero CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions

from raywb.cluster import NAMESPACE
from raywb.errors import FleetTimeout, RaywbError, ServiceUnavailable
from raywb.fleet.choice import OutletChoice, make_outlets
from raywb.fleet.collector import FleetSettings
from raywb.fleet.credentials import NAMES, Secret
from raywb.fleet.cycle import Outcome, repeat, run_once
from raywb.fleet.outlets import Outlet
from raywb.settings import process_environment

__all__ = ["FleetActor", "start_on_cluster", "stop_on_cluster"]

ACTOR_NAME = "raywb-fleet"

#: Time for Ray to start the actor's process, on top of what the collection may take, in seconds.
START_S = 60.0


class FleetActor:
    """Collects at intervals, in a thread, for as long as the cluster lives.

    What fails is kept and told by :meth:`last`; the next collection comes in its time.

    Args:
        settings: what a collection is to be like.
        choice: where the metrics go.
        interval_s: from one start to the next.
        handed: keys and names that the command had; what is not among them is looked for in the
            environment of the head node, and in AWS Secrets Manager.
    """

    def __init__(
        self,
        settings: FleetSettings,
        choice: OutletChoice,
        interval_s: float,
        handed: Mapping[str, Secret],
    ) -> None:
        self._settings = settings
        self._choice = choice
        self._interval_s = interval_s
        self._handed = handed
        self._outlets: list[Outlet] | None = None
        self._last: Outcome | RaywbError | None = None
        self._count = 0
        self._told = threading.Condition()
        # An actor whose start raises is never started again: whatever can fail is the thread's.
        threading.Thread(target=self._collect, name="raywb-fleet", daemon=True).start()

    def __repr__(self) -> str:
        """What Ray shows for it, in its list of actors and before its lines."""
        return ACTOR_NAME

    def last(self, after: int, timeout_s: float) -> tuple[int, Outcome | RaywbError | None]:
        """How the last cycle ended, and how many there were.

        Args:
            after: wait until there were more than so many.
            timeout_s: longest wait.
        """
        with self._told:
            self._told.wait_for(lambda: self._count > after, timeout_s)
            return self._count, self._last

    def _collect(self) -> None:
        repeat(self._interval_s, self._cycle, tell=self._tell, ended=threading.Event())

    def _cycle(self) -> Outcome:
        if self._outlets is None:
            self._outlets = make_outlets(self._choice, self._interval_s)
        handed = {name: secret.reveal() for name, secret in self._handed.items()}
        return run_once(self._settings, self._outlets, {**process_environment(), **handed})

    def _tell(self, ended: Outcome | RaywbError) -> None:
        with self._told:
            self._last = ended
            self._count += 1
            self._told.notify_all()


def start_on_cluster(
    settings: FleetSettings,
    choice: OutletChoice,
    interval_s: float,
    environment: Mapping[str, str],
) -> Outcome:
    """Start the collector on the cluster that this process is connected to; a former one ends.

    It returns with the first collection. One that failed is no reason to go on: then the actor is
    ended again.

    Raises:
        FleetError: the first collection failed.
        ServiceUnavailable: Ray did not start the actor in time.
    """
    stop_on_cluster()
    handed = {
        name: Secret(environment[name]) for name in NAMES if environment.get(name, "").strip()
    }
    actor: Any = (
        ray.remote(FleetActor)
        .options(
            name=ACTOR_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
            max_concurrency=4,
        )
        .remote(settings, choice, interval_s, handed)
    )
    try:
        _, ended = ray.get(
            actor.last.remote(0, settings.limit_s + START_S / 2), timeout=settings.limit_s + START_S
        )
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        ray.kill(actor)
        raise ServiceUnavailable(
            f"the fleet collector did not start on the cluster: {str(error).splitlines()[0]}. Its "
            "head node needs raywb, and a worker process to spare"
        ) from error
    if isinstance(ended, Outcome):
        return ended
    ray.kill(actor)
    raise ended or FleetTimeout("the first collection on the cluster did not end in time")


def stop_on_cluster() -> bool:
    """End the cluster's collector, and say whether there was one."""
    try:
        actor = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
    except ValueError:
        return False
    ray.kill(actor)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:  # the name is free a moment later
        try:
            ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
        except ValueError:
            break
        time.sleep(0.05)
    return True
