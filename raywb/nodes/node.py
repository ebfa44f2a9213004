"""What a whole machine has, whatever part of it a job was given (SPEC F)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import raywb
from raywb.nodes import cgroups, cpu, gpu, memory, nvml, surroundings
from raywb.settings import process_environment
from raywb.values import plain

__all__ = ["collect_node_facts"]

#: Packages whose versions are told; none of them is imported.
PACKAGES = ("ray", "torch", "wandb")


def collect_node_facts(
    environment: Mapping[str, str] | None = None,
    root: Path = Path("/"),
    *,
    load_nvml: nvml.Load = nvml.load,
    disk: Path = Path("/"),
) -> dict[str, Any]:
    """What this machine is and has: a dict that msgpack can carry.

    ``CUDA_VISIBLE_DEVICES``, Slurm's share and the process's affinity do not count. The limits
    of a container do not, either, but are told beside what they limit.

    Returns:
        ``hostname``, ``platform``, ``cpu_architecture``, ``cpu_count``, ``cpu_limit`` (CPUs that
        a cgroup allows), ``memory_gb``, ``memory_limit_gb`` (the same for memory),
        ``disk_total_gb``, ``disk_free_gb``, ``gpu_count``, ``gpu_type``, ``gpus`` (each with
        ``index``, ``uuid``, ``name``, ``total_memory_gb``, ``major``, ``minor``),
        ``driver_version``, ``cuda_version``, ``versions`` (python, raywb, ray, torch, wandb),
        ``container`` (``runtime``, ``image``) and ``cloud`` (``provider``, ``instance_id``,
        ``instance_type``, ``node_type``, ``market_type``, ``region``, ``zone``). GB are of 2³⁰
        bytes. What cannot be had is left out.

    Args:
        environment: where container and cloud are looked for; the process's by default.
        root: directory that holds ``proc``, ``sys``, ``dev`` and ``run``.
        load_nvml: returns the ``pynvml`` module, or None.
        disk: a path on the disk that is told.
    """
    environment = process_environment() if environment is None else environment
    cpu_count, total_bytes = os.cpu_count(), memory.total_memory_bytes()
    facts: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "cpu_architecture": cpu.architecture(),
        "cpu_count": cpu_count,
        "cpu_limit": _below(cgroups.cpu_limit(root), cpu_count),
        "memory_gb": memory.gigabytes(total_bytes),
        "memory_limit_gb": memory.gigabytes(
            _below(cgroups.memory_limit_bytes(root), total_bytes or memory.ABSURD_BYTES)
        ),
        **_disk_facts(disk),
        **gpu.node_gpu_facts(root=root, load_nvml=load_nvml),
        "versions": _versions(),
        "container": surroundings.container_facts(environment, root),
        "cloud": surroundings.cloud_facts(environment, root),
    }
    found: dict[str, Any] = plain(
        {key: fact for key, fact in facts.items() if fact is not None and fact not in ("", {})}
    )
    return found


def _below(limit: Any, total: float | None) -> Any:
    """The limit, if it limits anything."""
    return limit if limit is not None and (total is None or limit < total) else None


def _disk_facts(path: Path) -> dict[str, float | None]:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return {}
    return {
        "disk_total_gb": memory.gigabytes(usage.total),
        "disk_free_gb": memory.gigabytes(usage.free),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "raywb": raywb.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # it is not installed: a node needs neither torch nor wandb
    return found
