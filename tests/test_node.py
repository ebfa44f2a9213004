"""The facts of a whole machine, whatever a job on it was given."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import socket
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from nvml_stub import StubGpu, ask_nvml, build_nvml
from recorded_tree import V2_MOUNT, plant

import raywb
from raywb.nodes.cpu import architecture
from raywb.nodes.memory import gigabytes
from raywb.nodes.node import collect_node_facts


def test_the_whole_machine(tmp_path: Path) -> None:
    """A job's share does not count: neither Slurm's, nor CUDA's, nor the process's affinity."""
    environment = {
        "SLURM_JOB_ID": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_MEM_PER_NODE": "1M",
        "SLURM_GPUS_PER_NODE": "7",
        "CUDA_VISIBLE_DEVICES": "0,1,2",
    }
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        found = collect_node_facts(environment, tmp_path, load_nvml=lambda: None, disk=tmp_path)
    finally:
        os.sched_setaffinity(0, before)
    disk = found.pop("disk_total_gb"), found.pop("disk_free_gb")
    assert disk[0] >= disk[1] >= 0
    assert found == {
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "cpu_architecture": architecture(),
        "cpu_count": os.cpu_count(),
        "memory_gb": gigabytes(psutil.virtual_memory().total),
        "gpu_count": 0,
        "versions": {
            "python": platform.python_version(),
            "raywb": raywb.__version__,
            **{
                name: importlib.metadata.version(name)
                for name in ("ray", "torch", "wandb")
                if importlib.util.find_spec(name)
            },
        },
    }


def test_limits_of_a_container_are_told_beside(tmp_path: Path) -> None:
    """A pod's limits stand beside what the machine has; those that limit nothing do not."""
    files = {
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/memory.max": str(2**28),
        "sys/fs/cgroup/cpu.max": "50000 100000",
        "run/.containerenv": 'image="ray:1"\n',
        "sys/devices/virtual/dmi/id/sys_vendor": "Google\n",
    }
    found = collect_node_facts({}, plant(tmp_path, files), load_nvml=lambda: None)
    assert (found["cpu_limit"], found["memory_limit_gb"]) == (0.5, 0.25)
    assert found["memory_gb"] > 0.25
    assert found["container"] == {"runtime": "podman", "image": "ray:1"}
    assert found["cloud"] == {"provider": "gcp"}
    wide = {"sys/fs/cgroup/memory.max": str(2**60), "sys/fs/cgroup/cpu.max": "900000000 100000"}
    found = collect_node_facts({}, plant(tmp_path, wide), load_nvml=lambda: None)
    assert not {"cpu_limit", "memory_limit_gb"} & set(found)


def test_the_gpus_of_the_machine(tmp_path: Path) -> None:
    """All GPUs are told, whoever may use them, with the versions of driver and CUDA."""
    library = build_nvml(tmp_path, [StubGpu(), StubGpu(uuid="GPU-2")], cuda_version=13010)
    program = """
import json
from raywb.nodes.node import collect_node_facts
print(json.dumps(collect_node_facts()))
"""
    found = ask_nvml(library, program, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert found["gpu_count"] == 2
    assert [gpu["uuid"][:5] for gpu in found["gpus"]] == ["GPU-0", "GPU-2"]
    assert (found["driver_version"], found["cuda_version"]) == ("550.54.15", "13.1")


def test_this_machine_is_told_fast() -> None:
    """A probe costs next to nothing; the dict can be sent as it is."""
    program = """
import json, sys, time
from raywb.nodes.node import collect_node_facts
times = []
for _ in range(3):
    before = time.perf_counter()
    found = collect_node_facts()
    times.append(time.perf_counter() - before)
print(json.dumps([min(times), sorted(set(sys.modules) & {"torch", "wandb", "ray"}), found]))
"""
    best_s, heavy, found = ask_nvml(None, program)
    assert best_s < 0.05
    assert heavy == []
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found)) == found


def test_what_is_not_installed_has_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node without torch, on a disk that cannot be looked at, leaves both out."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = collect_node_facts({}, tmp_path, load_nvml=lambda: None, disk=tmp_path / "gone")
    assert set(found["versions"]) == {"python", "raywb"}
    assert not {"disk_total_gb", "disk_free_gb"} & set(found)
