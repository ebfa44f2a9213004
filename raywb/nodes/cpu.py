"""How many CPUs a job was given, and how many a machine has."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

from raywb.nodes import cgroups, slurm

__all__ = ["affinity_count", "architecture", "job_cpu_count"]

#: Other names of the same instruction sets, as kernels and distributions use them.
_ARCHITECTURES = {"aarch64": "arm64", "amd64": "x86_64", "x64": "x86_64"}

Count = Callable[[], int | None]


def job_cpu_count(
    environment: Mapping[str, str],
    root: Path = Path("/"),
    *,
    affinity: Count | None = None,
    online: Count = os.cpu_count,
) -> int | None:
    """CPUs allotted to this job: Slurm, then the cgroup's quota, affinity, all that there are.

    A part of a CPU counts as one. A quota that is wider than what the process may run on limits
    nothing, and is passed over.

    Args:
        environment: where Slurm's variables are looked for.
        root: directory that holds ``proc`` and ``sys``.
        affinity: how many CPUs the process may run on.
        online: how many CPUs the machine has.
    """
    if found := slurm.cpus_per_task(environment) or slurm.cpus_on_node(environment):
        return found
    usable = (affinity or affinity_count)() or online()
    limit = cgroups.cpu_limit(root)
    if limit is not None and (usable is None or limit < usable):
        return max(math.ceil(limit), 1)
    return usable


def affinity_count() -> int | None:
    """How many CPUs this process may run on, where the system tells."""
    try:
        return len(os.sched_getaffinity(0)) or None
    except (AttributeError, OSError):  # not on every system, and not in every sandbox
        return None


def architecture(machine: str | None = None) -> str | None:
    """The instruction set: ``x86_64``, ``arm64``, …; by default this machine's."""
    name = (platform.machine() if machine is None else machine).strip().lower()
    return _ARCHITECTURES.get(name, name) or None
