"""The metadata of a job: its exact shape, and that it never raises."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvml_stub import StubGpu, ask_nvml, build_nvml
from recorded_tree import V2_MOUNT, plant

import raywb
from raywb.nodes import slurm
from raywb.nodes.compute import collect_compute_metadata, console_line, job_metadata, system_facts
from raywb.nodes.cpu import architecture
from raywb.nodes.gpu import visible_devices

REPOSITORY = Path(__file__).parent.parent

#: Every variable that is looked at.
VARIABLES = sorted({*slurm.VARIABLES, "SLURM_NODEID", "CUDA_VISIBLE_DEVICES", "LOGNAME", "USER"})

#: Values that look like what is expected, and what else an environment can hold.
VALUES = st.text(max_size=12) | st.from_regex(
    r"([a-z]{0,4}:)?[0-9]{0,20}[KMGT]?(\(x[0-9]{0,8}\))?(,(GPU-|MIG-)?-?[0-9a-f/]{1,4}){0,3}",
    fullmatch=True,
)
ENVIRONMENTS = st.dictionaries(st.sampled_from(VARIABLES), VALUES | st.just("\udcff\udc80"))


def of(environment: dict[str, str], root: Path, cfg: Any = None) -> dict[str, Any]:
    return job_metadata(cfg, environment, root, load_nvml=lambda: None)


def test_the_exact_shape(tmp_path: Path) -> None:
    """Keys, nesting and types are those of the contract."""
    environment = {
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_MEM_PER_NODE": "1G",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "USER": "me",
    }
    cfg = {"model": {"batch_size": 1}, "runtime": {"debug": True}}
    root = plant(
        tmp_path,
        {"proc/self/mountinfo": V2_MOUNT, "sys/fs/cgroup/memory.max": str(2**29)},
    )
    assert of(environment, root, cfg) == {
        "system": {
            "platform": platform.platform(),
            "python_version": platform.python_version(),
            "hostname": socket.gethostname(),
            "user": "me",
        },
        "compute.cpu_count": 8,
        "compute.cpu_architecture": architecture(),
        "compute.gpu_count": 4,
        "compute.memory_gb": 0.5,
        "slurm": {
            "slurm_job_id": "7",
            "slurm_cpus_per_task": "8",
            "slurm_mem_per_node": "1G",
        },
        "model": {"batch_size": 1},
        "runtime": {"debug": True},
    }


def test_sections_that_are_not_there(tmp_path: Path) -> None:
    """Outside of Slurm and without a config only the machine is told."""
    assert set(of({}, tmp_path)) == {
        "system",
        "compute.cpu_count",
        "compute.cpu_architecture",
        "compute.gpu_count",
        "compute.memory_gb",
    }


def test_this_machine() -> None:
    """The public function looks at this process: its environment, and what it may use."""
    found = raywb.collect_compute_metadata()
    assert found == collect_compute_metadata(None)
    assert found["compute.cpu_count"] >= 1
    assert found["compute.memory_gb"] > 0
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found)) == found


def test_the_environment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job's script exports is seen."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16(x2)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = raywb.collect_compute_metadata({"runtime": {"use_llm_x": 1}})
    assert found["slurm"] == {"slurm_job_id": "4711", "slurm_cpus_on_node": "16(x2)"}
    assert found["compute.cpu_count"] == 16
    assert found["compute.gpu_count"] == 0
    assert found["runtime"] == {"use_llm_x": 1}


def test_with_gpus(tmp_path: Path) -> None:
    """A process on a machine with two GPUs tells both; asking torch here tells no more."""
    library = build_nvml(tmp_path, [StubGpu(), StubGpu(uuid="GPU-2", name="NVIDIA L4", major=8)])
    program = "import json, raywb; print(json.dumps(raywb.collect_compute_metadata()))"
    found = ask_nvml(library, program, environment={"CUDA_VISIBLE_DEVICES": "GPU-2,0"})
    assert found["compute.gpu_count"] == 2
    assert found["compute.gpu_type"] == "NVIDIA L4"
    assert [gpu["index"] for gpu in found["compute.gpus"]] == [1, 0]
    assert set(found["compute.gpus"][0]) - {"multi_processor_count"} == {
        "index",
        "name",
        "total_memory_gb",
        "major",
        "minor",
    }
    line = console_line(found)
    assert line.endswith(" 2 GPUs")


@settings(max_examples=60, deadline=None, print_blob=True)
@given(environment=ENVIRONMENTS)
def test_no_environment_makes_it_raise(environment: dict[str, str]) -> None:
    """Whatever the variables hold, the result has the right types and can be sent."""
    found = of(environment, Path("/nowhere"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found)) == found
    json.dumps(found).encode()
    assert found["compute.cpu_count"] >= 1
    assert found["compute.gpu_count"] >= 0
    assert found["compute.memory_gb"] >= 0
    assert all(value for value in found.get("slurm", {}).values())
    entries = visible_devices(environment.get("CUDA_VISIBLE_DEVICES"))
    assert entries is None or found["compute.gpu_count"] == len(entries)


FILES = st.sampled_from(
    [
        "proc/self/cgroup",
        "proc/self/mountinfo",
        "sys/fs/cgroup/memory.max",
        "sys/fs/cgroup/cpu.max",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us",
        "sys/fs/cgroup/memory/memory.stat",
    ]
)
CONTENTS = st.binary(max_size=40) | st.sampled_from(
    [b"0::/a/\0/b\n", V2_MOUNT.encode(), b"1 1 0:1 /\\777 /\\000 rw - cgroup2 a b\n", b"9" * 5000]
)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(files=st.dictionaries(FILES, CONTENTS))
def test_no_file_makes_it_raise(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    """Whatever /proc and /sys hold, and be it directories in place of files, there is an answer."""
    root = plant(tmp_path_factory.mktemp("tree"), files)
    (root / "dev").mkdir()
    found = of({}, root)
    assert found["compute.cpu_count"] >= 1
    (root / "run/cloud-init/instance-data.json").mkdir(parents=True)
    assert of({}, root) == found


def test_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names the user, else the system does; a user without a name has none."""
    assert system_facts({"USER": "b", "LOGNAME": "a"})["user"] == "a"
    assert system_facts({"USER": "", "USERNAME": "c"})["user"] == "c"
    pwd = pytest.importorskip("pwd")
    assert system_facts({})["user"] == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 17)
    assert "user" not in system_facts({})


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ((8, 4), "[raywb] ✓ Logged compute metadata: 8 CPUs, 4 GPUs"),
        ((1, 1), "[raywb] ✓ Logged compute metadata: 1 CPU, 1 GPU"),
        ((2, 0), "[raywb] ✓ Logged compute metadata: 2 CPUs, 0 GPUs"),
        ((2, None), "[raywb] ✓ Logged compute metadata: 2 CPUs"),
        ((None, None), "[raywb] ✓ Logged compute metadata"),
    ],
)
def test_the_console_line(counts: tuple[int | None, int | None], line: str) -> None:
    """The line tells the counts that are known, in the singular where it is one."""
    keys = ("compute.cpu_count", "compute.gpu_count")
    metadata = {key: count for key, count in zip(keys, counts, strict=True) if count is not None}
    assert console_line(metadata) == line


def test_it_stays_cheap() -> None:
    """Neither torch, pynvml nor omegaconf is imported where nothing needs them."""
    program = """
import sys, raywb
raywb.collect_compute_metadata({"model": {"batch_size": 1}})
print(sorted(set(sys.modules) & {"torch", "pynvml", "omegaconf", "ray", "wandb"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
