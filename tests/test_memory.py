"""How much memory a job has: who is asked first, and which answers are none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from recorded_tree import NO_LIMIT_V1, V1_MOUNTS, V2_MOUNT, plant

from raywb.nodes.memory import gigabytes, job_memory_gb, total_memory_bytes

GIB = 2**30


def machine_of(size_gb: int) -> Callable[[], int]:
    return lambda: size_gb * GIB


def with_limit(root: Path, limit: str) -> Path:
    return plant(root, {"proc/self/mountinfo": V2_MOUNT, "sys/fs/cgroup/memory.max": limit})


def test_the_first_that_answers_wins(tmp_path: Path) -> None:
    """The cgroup, Slurm per node, Slurm per CPU, the machine: in this order."""
    root, empty = with_limit(tmp_path / "limit", f"{3 * GIB}"), tmp_path / "empty"
    environment = {"SLURM_MEM_PER_NODE": "4G", "SLURM_MEM_PER_CPU": "512"}

    def memory(root: Path) -> float | None:
        return job_memory_gb(environment, 4, root, total_bytes=machine_of(64))

    assert memory(root) == 3.0
    assert memory(empty) == 4.0
    environment["SLURM_MEM_PER_NODE"] = "0"
    assert memory(empty) == 2.0
    environment["SLURM_MEM_PER_CPU"] = "0"
    assert memory(empty) == 64.0


def test_memory_per_cpu_needs_the_cpus(tmp_path: Path) -> None:
    """Without a number of CPUs, memory per CPU tells nothing."""
    environment = {"SLURM_MEM_PER_CPU": "512"}
    assert job_memory_gb(environment, None, tmp_path, total_bytes=machine_of(64)) == 64.0


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", f"{64 * GIB}", f"{65 * GIB}", "0"])
def test_limits_that_limit_nothing(tmp_path: Path, limit: str) -> None:
    """No limit, and one that is not below what the machine has, leave the word to Slurm."""
    root = with_limit(tmp_path, limit)
    assert job_memory_gb({}, 1, root, total_bytes=machine_of(64)) == 64.0
    slurm = {"SLURM_MEM_PER_NODE": "32G"}
    assert job_memory_gb(slurm, 1, root, total_bytes=machine_of(64)) == 32.0


def test_v1_without_a_limit_on_a_machine_of_unknown_size(tmp_path: Path) -> None:
    """The huge number of v1 is no limit, also where nothing tells the machine's memory."""
    files = {
        "proc/self/mountinfo": V1_MOUNTS,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
    }
    assert job_memory_gb({}, 1, plant(tmp_path, files), total_bytes=lambda: None) is None


def test_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil is asked first; without it, `os.sysconf` knows the same."""
    from_psutil = total_memory_bytes()
    assert from_psutil == psutil.virtual_memory().total
    monkeypatch.setitem(sys.modules, "psutil", None)
    from_sysconf = total_memory_bytes()
    assert from_sysconf == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert from_sysconf == pytest.approx(from_psutil, rel=0.01)


def test_sources_that_do_not_answer() -> None:
    """The next source is asked, and at the end there is no answer."""
    assert total_memory_bytes(sources=(lambda: None, lambda: 0, lambda: 7)) == 7
    assert total_memory_bytes(sources=(lambda: None,)) is None


def test_gigabytes() -> None:
    """GB are Slurm's, 2**30 bytes, to the hundredth."""
    assert gigabytes(32 * GIB) == 32.0
    assert gigabytes(85520809984) == 79.65
    assert isinstance(gigabytes(GIB), float)
    assert gigabytes(None) is None
