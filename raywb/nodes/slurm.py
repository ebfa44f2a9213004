"""What Slurm says about a job in its environment, in the odd forms that it uses.

The variables and their forms are those of ``sbatch(1)`` and ``srun(1)``, "output environment
variables".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "cpus_on_node",
    "cpus_per_task",
    "gpus_per_node",
    "mem_per_cpu_bytes",
    "mem_per_node_bytes",
    "slurm_facts",
]

#: What is told about a job, in this order; a key is its variable's name in lower case.
VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_NODELIST",
    "SLURM_NNODES",
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPUS_ON_NODE",
    "SLURM_MEM_PER_NODE",
    "SLURM_MEM_PER_CPU",
    "SLURM_GPUS_PER_NODE",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_JOB_PARTITION",
    "SLURM_SUBMIT_DIR",
    "SUBMITIT_JOB_ID",
)

_COUNT = re.compile(r"[0-9]{1,6}")
_PER_NODE = re.compile(r"([^()]+)(?:\(x([0-9]{1,6})\))?")
_MEMORY = re.compile(r"([0-9]{1,12})([KMGTP]?)B?", re.IGNORECASE)
_SOCKETS = re.compile(r"\([^)]*\)")

#: Bytes of a size's unit; a bare number is in megabytes.
_UNIT_BYTES = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


def slurm_facts(environment: Mapping[str, str]) -> dict[str, str]:
    """The ``slurm`` section: what is set, as it is written; nothing outside of a Slurm job."""
    if not (environment.get("SLURM_JOB_ID") or environment.get("SUBMITIT_JOB_ID")):
        return {}
    return {name.lower(): environment[name] for name in VARIABLES if environment.get(name)}


def cpus_per_task(environment: Mapping[str, str]) -> int | None:
    """``SLURM_CPUS_PER_TASK``."""
    return _count(environment.get("SLURM_CPUS_PER_TASK")) or None


def cpus_on_node(environment: Mapping[str, str]) -> int | None:
    """``SLURM_CPUS_ON_NODE``: ``16``, or per node of the job, ``16(x2)`` and ``72(x2),36``."""
    return _count(_on_this_node(environment, "SLURM_CPUS_ON_NODE")) or None


def gpus_per_node(environment: Mapping[str, str]) -> int | None:
    """``SLURM_GPUS_PER_NODE`` over all types: ``4``, ``a100:4``, ``a100:2,v100:2``."""
    text = environment.get("SLURM_GPUS_PER_NODE")
    if not text:
        return None
    counts = [_count(part.rpartition(":")[2]) for part in _SOCKETS.sub("", text).split(",")]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def mem_per_node_bytes(environment: Mapping[str, str]) -> int | None:
    """``SLURM_MEM_PER_NODE``; 0 asks for all that a node has, and is no number of bytes."""
    return _bytes(_on_this_node(environment, "SLURM_MEM_PER_NODE"))


def mem_per_cpu_bytes(environment: Mapping[str, str]) -> int | None:
    """``SLURM_MEM_PER_CPU``; 0 is no limit."""
    return _bytes(environment.get("SLURM_MEM_PER_CPU"))


def _on_this_node(environment: Mapping[str, str], variable: str) -> str | None:
    """This node's part of ``72(x2),36``: the one that ``SLURM_NODEID`` points to, else the first.

    A list that ends before it answers with its last part.
    """
    left = _count(environment.get("SLURM_NODEID")) or 0
    value: str | None = None
    for part in environment.get(variable, "").split(","):
        if not (found := _PER_NODE.fullmatch(part.strip())):
            return None
        value, times = found[1], int(found[2] or 1)
        if left < times:
            break
        left -= times
    return value


def _count(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if _COUNT.fullmatch(text) else None


def _bytes(text: str | None) -> int | None:
    found = _MEMORY.fullmatch((text or "").strip())
    return int(found[1]) * _UNIT_BYTES[found[2].upper()] or None if found else None
