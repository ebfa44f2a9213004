"""What a job was given, for the config of its run (SPEC A)."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raywb.nodes import cpu, gpu, memory, nvml, slurm
from raywb.nodes.config_facts import config_facts
from raywb.settings import process_environment
from raywb.values import plain

__all__ = ["collect_compute_metadata", "console_line", "job_metadata", "system_facts"]


def collect_compute_metadata(cfg: Any = None) -> dict[str, Any]:
    """What this process's job was given, ready for ``wandb.config``.

    The keys are ``system``, ``compute.cpu_count``, ``compute.cpu_architecture``,
    ``compute.gpu_count``, ``compute.gpu_type``, ``compute.gpus``, ``compute.memory_gb``,
    ``slurm``, ``model`` and ``runtime``. A fact that cannot be had is left out. Memory is in GB
    of 2³⁰ bytes. On a machine with GPUs and a torch that is made for them, torch is asked in a
    process of its own, once, for at most 10 s.

    Args:
        cfg: an OmegaConf or Hydra config, a mapping, or None; ``cfg.model`` and ``cfg.runtime``
            are looked at.
    """
    return job_metadata(cfg, process_environment())


def job_metadata(
    cfg: Any,
    environment: Mapping[str, str],
    root: Path = Path("/"),
    *,
    load_nvml: nvml.Load = nvml.load,
    ask_torch: gpu.AskTorch | None = None,
) -> dict[str, Any]:
    """The same of the world that is given.

    Args:
        cfg: as above.
        environment: the job's environment.
        root: directory that holds ``proc``, ``sys`` and ``dev``.
        load_nvml: returns the ``pynvml`` module, or None.
        ask_torch: asks torch for the GPUs that an environment shows.
    """
    cpu_count = cpu.job_cpu_count(environment, root)
    facts: dict[str, Any] = {
        "system": system_facts(environment),
        "compute.cpu_count": cpu_count,
        "compute.cpu_architecture": cpu.architecture(),
        "compute.memory_gb": memory.job_memory_gb(environment, cpu_count, root),
        **gpu.job_gpu_facts(environment, root, load_nvml=load_nvml, ask_torch=ask_torch),
        "slurm": slurm.slurm_facts(environment) or None,
        **config_facts(cfg),
    }
    found: dict[str, Any] = plain({key: fact for key, fact in facts.items() if fact is not None})
    return found


def system_facts(environment: Mapping[str, str]) -> dict[str, str]:
    """``platform``, ``python_version``, ``hostname`` and ``user`` of this process."""
    facts = {
        "platform": platform.platform(),
        "python_version": platform.python_version(),
        "hostname": socket.gethostname(),
        "user": _user(environment),
    }
    return {key: fact for key, fact in facts.items() if fact}


def _user(environment: Mapping[str, str]) -> str | None:
    """Who runs this, as ``getpass.getuser`` finds it; a container may know no name for its user."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if user := environment.get(name):
            return user
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, LookupError, OSError):
        return None


def console_line(metadata: Mapping[str, Any]) -> str:
    """The line that tells what was logged: ``[raywb] ✓ Logged compute metadata: 8 CPUs, 4 GPUs``.

    A count that is not known is not told.
    """
    line = "[raywb] ✓ Logged compute metadata"
    counts = [
        f"{count} {name}{'' if count == 1 else 's'}"
        for name in ("CPU", "GPU")
        if (count := metadata.get(f"compute.{name.lower()}_count")) is not None
    ]
    return f"{line}: {', '.join(counts)}" if counts else line
