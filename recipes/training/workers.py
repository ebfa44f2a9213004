"""How many workers train, on what: decided when data are prepared, and told where it takes time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray

from recipes.autoscaling import autoscaler_is_there
from recipes.errors import ClusterError, SettingsError
from recipes.training.settings import TrainSettings

__all__ = ["CPU_WORKERS", "START_ATTEMPTS", "Cluster", "Workers", "choose_workers", "environment"]

#: Workers on a cluster without GPUs, unless settings say how many.
CPU_WORKERS = 2

#: How often Ray Train waits a minute for nodes that have what the workers need.
START_ATTEMPTS = 10

#: How long Ray may take to count what the pipeline gave back.
_GIVEN_BACK_S = 3.0
_LOOK_AGAIN_S = 0.1


@dataclass(frozen=True)
class Workers:
    """How many workers there are, and what each gets."""

    count: int
    on_gpu: bool
    cpus: int

    @property
    def resources(self) -> dict[str, float]:
        """What Ray sets aside for each."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.on_gpu else {})}


@dataclass(frozen=True)
class Cluster:
    """What a cluster has, by the name of the resource.

    Attributes:
        total: of all nodes.
        free: returns what nobody uses now.
        autoscaled: whether it can grow.
    """

    total: Mapping[str, float]
    free: Callable[[], Mapping[str, float]]
    autoscaled: bool

    @classmethod
    def connected(cls) -> Cluster:
        """Return the one that this driver is connected to."""
        return cls(ray.cluster_resources(), ray.available_resources, autoscaler_is_there())


def choose_workers(
    settings: TrainSettings, cluster: Cluster, announce: Callable[[str], None]
) -> Workers:
    """Say how many workers there are, on what; tell when the cluster has not enough for them now.

    Raises:
        ClusterError: it has not enough for them, and cannot grow.
        SettingsError: GPUs are asked for by name, their number is not, and there are none.
    """
    gpus = int(cluster.total.get("GPU", 0))
    on_gpu = gpus > 0 if settings.use_gpu is None else settings.use_gpu
    count = settings.workers or (gpus if on_gpu else CPU_WORKERS)
    if not count:
        way_out = (
            "set train.workers too, and training waits for nodes that have them"
            if cluster.autoscaled
            else "train.use_gpu=null takes CPUs where there is none"
        )
        raise SettingsError(f"train.use_gpu=true, and the cluster has no GPU now: {way_out}")
    if settings.use_gpu is None and not on_gpu and cluster.autoscaled:
        announce(
            "Training on CPUs: the cluster has no GPU now; train.use_gpu=true train.workers=N "
            "asks the autoscaler for nodes that have them"
        )
    workers = Workers(count, on_gpu, settings.cpus_per_worker)
    _check_total(workers, cluster, announce)
    return workers


def _check_total(workers: Workers, cluster: Cluster, announce: Callable[[str], None]) -> None:
    needed = {name: amount * workers.count for name, amount in workers.resources.items()}
    enough = True
    for name, amount in needed.items():
        there = cluster.total.get(name, 0)
        if amount <= there:
            continue
        enough = False
        lacking = f"training workers need {amount:g} {name}s, and the cluster has {there:g}"
        if not cluster.autoscaled:
            keys = "train.workers" if name == "GPU" else "train.workers or train.cpus_per_worker"
            raise ClusterError(f"{lacking} and no autoscaler that could bring more: lower {keys}")
        announce(f"The {lacking}: waiting up to {START_ATTEMPTS} minutes for more nodes …")
    if enough:
        _tell_who_waits(needed, cluster, announce)


def _tell_who_waits(
    needed: Mapping[str, float], cluster: Cluster, announce: Callable[[str], None]
) -> None:
    """Tell that others use what the workers need, unless it was only just given back."""
    deadline = time.monotonic() + _GIVEN_BACK_S
    while True:
        free = cluster.free()
        taken = [name for name, amount in needed.items() if amount > free.get(name, 0)]
        if not taken:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_AGAIN_S)
    for name in taken:
        announce(
            f"Waiting up to {START_ATTEMPTS} minutes for {needed[name]:g} {name}s: "
            f"{free.get(name, 0):g} of {cluster.total[name]:g} are free, others use the rest …"
        )


def environment(workers: Workers) -> dict[str, str]:
    """Return the environment of the workers.

    One thread per CPU that a worker has: with torch's own choice, each of several workers on a
    node would take all of its cores. Where all of Ray listens on the loopback address alone, gloo
    does so too, whatever the machine's name leads to.

    Nothing is said of GPUs: Ray Train itself gives each worker all GPUs that workers of its node
    have, in ``CUDA_VISIBLE_DEVICES``, and each finds its own among them. It does so whether or not
    Ray sets that variable, which cosmos-xenna forbids it (seen in Ray 2.60's
    ``train/v2/_internal/callbacks/accelerators.py``).
    """
    variables = {"OMP_NUM_THREADS": str(workers.cpus)}
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if all(address.startswith("127.") for address in addresses):
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    return variables
