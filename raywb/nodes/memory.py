"""How much memory a job was given, and how much a machine has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from raywb.nodes import cgroups, slurm

__all__ = ["BYTES_PER_GB", "gigabytes", "job_memory_gb", "total_memory_bytes"]

#: Bytes in the GB of these metadata: Slurm's and Kubernetes' unit, so that a job that asked for
#: 32G, and a GPU that is sold with 80 GB, show the number that people know them by.
BYTES_PER_GB = 2**30

#: More than any machine has: a limit above it is none, where the machine's size is not known.
ABSURD_BYTES = 2**60

Bytes = Callable[[], int | None]


def job_memory_gb(
    environment: Mapping[str, str],
    cpu_count: int | None,
    root: Path = Path("/"),
    *,
    total_bytes: Bytes | None = None,
) -> float | None:
    """Memory allotted to this job in GB: the cgroup's limit, Slurm's, all that there is.

    A cgroup limit that is not below the machine's memory limits nothing, and is passed over.

    Args:
        environment: where Slurm's variables are looked for.
        cpu_count: the job's CPUs, for memory that Slurm allots per CPU.
        root: directory that holds ``proc`` and ``sys``.
        total_bytes: the machine's memory.
    """
    total = (total_bytes or total_memory_bytes)()
    limit = cgroups.memory_limit_bytes(root)
    if limit is not None and limit < (total or ABSURD_BYTES):
        return gigabytes(limit)
    if per_node := slurm.mem_per_node_bytes(environment):
        return gigabytes(per_node)
    if (per_cpu := slurm.mem_per_cpu_bytes(environment)) and cpu_count:
        return gigabytes(per_cpu * cpu_count)
    return gigabytes(total)


def gigabytes(size_bytes: int | None) -> float | None:
    """The size in GB, to the hundredth."""
    return round(size_bytes / BYTES_PER_GB, 2) if size_bytes is not None else None


def total_memory_bytes(*, sources: tuple[Bytes, ...] | None = None) -> int | None:
    """The machine's memory, from the first source that answers: psutil, then ``os.sysconf``."""
    for source in sources or (_psutil_bytes, _sysconf_bytes):
        if found := source():
            return found
    return None


def _psutil_bytes() -> int | None:
    try:
        import psutil

        return int(psutil.virtual_memory().total)
    except (ImportError, OSError, RuntimeError, LookupError, ValueError):
        return None  # it reads /proc/meminfo, which not every sandbox shows in full


def _sysconf_bytes() -> int | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return size if size > 0 else None
