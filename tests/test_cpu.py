"""How many CPUs a job has: who is asked first, and how parts of a CPU count."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from recorded_tree import V2_MOUNT, plant

from raywb.nodes.cpu import affinity_count, architecture, job_cpu_count


def with_quota(root: Path, quota: str) -> Path:
    return plant(root, {"proc/self/mountinfo": V2_MOUNT, "sys/fs/cgroup/cpu.max": quota})


def test_the_first_that_answers_wins(tmp_path: Path) -> None:
    """Slurm's task, Slurm's node, the quota, affinity, all there are: in this order."""
    root, empty = with_quota(tmp_path / "quota", "400000 100000"), tmp_path / "empty"
    environment = {"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "16(x2)"}

    def count(root: Path, affinity: int | None = 12) -> int | None:
        return job_cpu_count(environment, root, affinity=lambda: affinity, online=lambda: 64)

    assert count(root) == 3
    del environment["SLURM_CPUS_PER_TASK"]
    assert count(root) == 16
    environment["SLURM_CPUS_ON_NODE"] = "0"
    assert count(root) == 4
    assert count(empty) == 12
    assert count(empty, affinity=None) == 64


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("150000 100000", 2),
        ("100000 100000", 1),
        ("20000 100000", 1),
        ("100001 100000", 2),
        ("1600000 100000", 8),  # wider than the eight CPUs that the process may run on
        ("max 100000", 8),
    ],
)
def test_parts_of_a_cpu(tmp_path: Path, quota: str, count: int) -> None:
    """A quota is rounded up, is at least one, and limits nothing above the affinity."""
    root = with_quota(tmp_path, quota)
    assert job_cpu_count({}, root, affinity=lambda: 8, online=lambda: 64) == count


def test_nobody_answers(tmp_path: Path) -> None:
    """Where nothing tells, there is no count; a quota alone still is one."""
    assert job_cpu_count({}, tmp_path, affinity=lambda: None, online=lambda: None) is None
    root = with_quota(tmp_path, "300000 100000")
    assert job_cpu_count({}, root, affinity=lambda: None, online=lambda: None) == 3


def test_the_real_affinity() -> None:
    """A process that is bound to one CPU has one."""
    before = os.sched_getaffinity(0)
    assert affinity_count() == len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert affinity_count() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("x86_64", "x86_64"),
        ("AMD64", "x86_64"),
        ("aarch64", "arm64"),
        ("arm64", "arm64"),
        ("riscv64", "riscv64"),
        ("", None),
    ],
)
def test_architecture(machine: str, name: str | None) -> None:
    """Different systems' names of one instruction set are one."""
    assert architecture(machine) == name
    assert architecture() == architecture(platform.machine())
