"""Which GPUs a job has: the real ``pynvml`` on a library that reports what a test says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from nvml_stub import (
    DRIVER_NOT_LOADED,
    VERSION_MISMATCH,
    StubGpu,
    StubPartition,
    ask_nvml,
    build_nvml,
)

from raywb.nodes import nvml
from raywb.nodes.gpu import device_files, job_gpu_facts, node_gpu_facts, select, visible_devices
from raywb.nodes.nvml import Gpu

H100 = {"name": "NVIDIA H100 80GB HBM3", "total_memory_gb": 80.0, "major": 9, "minor": 0}

#: Answers to many cases from one process: starting one, and its pynvml, takes longest.
PROGRAM = """
import json, sys
from pathlib import Path
from raywb.nodes.gpu import job_gpu_facts, node_gpu_facts
from raywb.nodes.nvml import Gpu
known = {known!r}
torch = None if known is None else tuple(Gpu(*device) for device in known)
answers = [job_gpu_facts(case, Path({root!r}), ask_torch=lambda _: torch) for case in {cases!r}]
heavy = sorted(set(sys.modules) & {{"torch", "pynvml"}})
print(json.dumps([answers, node_gpu_facts(root=Path({root!r})), heavy]))
"""


def ask(
    library: Path | None,
    *cases: Mapping[str, str],
    root: Path = Path("/nowhere"),
    torch: list[list[Any]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """The job's facts for each environment, the node's, and which heavy modules were loaded."""
    program = PROGRAM.format(cases=[dict(case) for case in cases], root=str(root), known=torch)
    jobs, node, heavy = ask_nvml(library, program)
    return jobs, node, heavy


def visible(text: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": text}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver of a machine with eight GPUs, two of which begin with the same digits."""
    uuids = [f"GPU-{number}a{number}b-0000" for number in range(7)] + ["GPU-6a6b-1111"]
    return build_nvml(tmp_path_factory.mktemp("eight"), [StubGpu(uuid=uuid) for uuid in uuids])


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver of a machine with a whole A100, and one of which MIG made three devices."""
    parts = [
        StubPartition("MIG-aaaa-1", gpu_instance=1),
        StubPartition("MIG-aabb-2", gpu_instance=1, compute_instance=10),
        StubPartition("MIG-cccc-3", gpu_instance=7, memory_bytes=20 * 2**30, name="MIG 3g.20gb"),
    ]
    a100 = {"name": "NVIDIA A100-SXM4-40GB", "memory_bytes": 40 * 2**30, "major": 8}
    gpus = [StubGpu(uuid="GPU-whole", **a100), StubGpu(uuid="GPU-cut", partitions=parts, **a100)]
    return build_nvml(tmp_path_factory.mktemp("sliced"), gpus)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (None, None),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", ["0"]),
        (" 2, 1 ", ["2", "1"]),
        ("0,2,-1,1", ["0", "2"]),
        ("0,,1", ["0"]),
        ("00,+1", ["0", "1"]),
        ("1gpu", ["1"]),
        ("1,1", []),
        ("GPU-aa,GPU-bb", ["GPU-aa", "GPU-bb"]),
        ("GPU-aa,0", ["GPU-aa", "0"]),
        ("MIG-aaaa-1", ["MIG-aaaa-1"]),
        ("MIG-GPU-cut/1/0,MIG-GPU-cut/7/0", ["MIG-GPU-cut/1/0", "MIG-GPU-cut/7/0"]),
        ("all", []),
    ],
)
def test_what_cuda_visible_devices_says(text: str | None, entries: list[str] | None) -> None:
    """Entries count up to the first that is none; not set is something else than empty."""
    assert visible_devices(text) == entries
    if entries is not None:
        facts = job_gpu_facts({"CUDA_VISIBLE_DEVICES": text or ""}, load_nvml=lambda: None)
        assert facts == {"compute.gpu_count": len(entries)}


def test_the_order_of_who_counts(eight: Path) -> None:
    """CUDA_VISIBLE_DEVICES goes before Slurm, and Slurm before NVML."""
    slurm = {"SLURM_GPUS_PER_NODE": "a100:2,v100:1"}
    (one, three, all_eight, none), _, _ = ask(
        eight, slurm | visible("5"), slurm, {}, slurm | visible("")
    )
    assert one["compute.gpu_count"] == 1
    assert three["compute.gpu_count"] == 3
    assert all_eight["compute.gpu_count"] == 8
    assert none == {"compute.gpu_count": 0}


def test_what_nvml_tells(eight: Path) -> None:
    """Each GPU is there with what NVML knows of it, and torch is not imported."""
    (job,), node, heavy = ask(eight, {})
    assert job["compute.gpu_type"] == "NVIDIA H100 80GB HBM3"
    assert job["compute.gpus"] == [{"index": index, **H100} for index in range(8)]
    assert heavy == ["pynvml"]
    assert (node["gpu_count"], node["gpu_type"]) == (8, "NVIDIA H100 80GB HBM3")
    assert node["gpus"][6] == {"index": 6, "uuid": "GPU-6a6b-0000", **H100}
    assert (node["driver_version"], node["cuda_version"]) == ("550.54.15", "12.4")


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("3,1", [3, 1]),
        ("GPU-5a,2,GPU-0A0B-0000", [5, 2, 0]),
        ("GPU-6a6b,1", []),  # two GPUs begin so
        ("GPU-6a6b-1,1", [7, 1]),
        ("1,99,2", [1]),
        ("1,MIG-aaaa,2", [1]),
    ],
)
def test_which_gpus_are_visible(text: str, indices: list[int]) -> None:
    """GPUs are named by index or the beginning of their UUID, and come in the order named."""
    uuids = [f"GPU-{number}a{number}b-0000" for number in range(7)] + ["GPU-6a6b-1111"]
    gpus = [Gpu(index, uuid) for index, uuid in enumerate(uuids)]
    assert [gpu.index for gpu in select(gpus, visible_devices(text))] == indices


def test_a_selection_of_real_readings(eight: Path) -> None:
    """The list shows what CUDA would: those selected, in their order, with the node's numbers."""
    (job, unknown), node, _ = ask(eight, visible("GPU-5a,2"), visible("GPU-unknown"))
    assert job["compute.gpus"] == [{"index": 5, **H100}, {"index": 2, **H100}]
    assert unknown == {"compute.gpu_count": 1}
    assert node["gpu_count"] == 8


def test_mig_devices(sliced: Path) -> None:
    """A part of a GPU counts as one, under both forms of its name, with its own memory."""
    (by_uuid, by_place, outer, gone, whole), node, _ = ask(
        sliced,
        visible("MIG-cccc,MIG-aaaa-1"),
        visible("MIG-GPU-cut/1/10,MIG-GPU-cut/1/0"),
        visible("MIG-GPU-cut/1/1"),
        visible("MIG-aa"),
        visible("0"),
    )
    big = {"index": 1, "name": "MIG 3g.20gb", "total_memory_gb": 20.0, "major": 8, "minor": 0}
    small = big | {"name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "total_memory_gb": 5.0}
    assert by_uuid["compute.gpu_count"] == by_place["compute.gpu_count"] == 2
    assert by_uuid["compute.gpus"] == [big, small]
    assert by_uuid["compute.gpu_type"] == "MIG 3g.20gb"
    assert by_place["compute.gpus"] == [small, small]
    assert outer == gone == {"compute.gpu_count": 1}  # no such part; two that begin so
    assert whole["compute.gpus"][0]["total_memory_gb"] == 40.0
    assert [gpu["name"] for gpu in node["gpus"]] == ["NVIDIA A100-SXM4-40GB"] * 2


def test_a_share_of_gpus_that_slurm_does_not_name(tmp_path: Path, eight: Path) -> None:
    """Of eight alike, three are known but for their numbers; of different ones nothing is."""
    share = {"SLURM_GPUS_PER_NODE": "3"}
    (alike,), _, _ = ask(eight, share)
    assert alike["compute.gpus"] == [H100] * 3
    mixed = build_nvml(tmp_path, [StubGpu(), StubGpu(name="T4"), StubGpu(), StubGpu()])
    (different,), _, _ = ask(mixed, share)
    assert different == {"compute.gpu_count": 3}


def test_the_number_of_processors_comes_from_torch(eight: Path) -> None:
    """It is torch's for the same UUID, or else for the same place and name, or left out."""
    name, case = "NVIDIA H100 80GB HBM3", visible("6,0")

    def counts(torch: list[list[Any]]) -> list[int | None]:
        (job,), node, _ = ask(eight, case, torch=torch)
        assert "multi_processor_count" not in node["gpus"][0]
        return [gpu.get("multi_processor_count") for gpu in job["compute.gpus"]]

    by_uuid = [[0, "0a0b-0000", name, 1, 9, 0, 100], [1, "6a6b-0000", name, 1, 9, 0, 106]]
    assert counts(by_uuid) == [106, 100]
    assert counts(by_uuid[:1]) == [None, 100]
    assert counts([[0, None, name, 1, 9, 0, 1], [1, None, name, 1, 9, 0, 2]]) == [1, 2]
    assert counts([[0, None, "other", 1, 9, 0, 1], [1, None, name, 1, 9, 0, 2]]) == [None, 2]
    assert counts([[0, None, name, 1, 9, 0, 1]]) == [None, None]


def test_readings_that_fail(tmp_path: Path) -> None:
    """What one GPU does not tell is left out of it, and a lost one of the list alone."""
    gpus = [StubGpu(memory_bytes=None), StubGpu(lost=True), StubGpu()]
    absent = {"nvmlDeviceGetCudaComputeCapability", "nvmlSystemGetDriverVersion", "nvmlErrorString"}
    (job,), node, _ = ask(build_nvml(tmp_path, gpus, without=absent), {})
    assert job["compute.gpu_count"] == node["gpu_count"] == 3
    assert job["compute.gpus"] == [
        {"index": 0, "name": H100["name"]},
        {"index": 2, "name": H100["name"], "total_memory_gb": 80.0},
    ]
    assert "driver_version" not in node


@pytest.mark.parametrize("code", [DRIVER_NOT_LOADED, VERSION_MISMATCH])
def test_a_driver_that_does_not_work(tmp_path: Path, code: int) -> None:
    """Without a device file there is no GPU; with one, nobody can tell how many."""
    library = build_nvml(tmp_path / "lib", [StubGpu()], init_code=code)
    (job,), node, _ = ask(library, {})
    assert (job, node) == ({"compute.gpu_count": 0}, {"gpu_count": 0})
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    (job, told), node, _ = ask(library, {}, visible("0,1"), root=tmp_path)
    assert (job, told, node) == ({}, {"compute.gpu_count": 2}, {})


def test_no_driver() -> None:
    """Without the library pynvml is not even imported, and there are no GPUs."""
    (job,), node, heavy = ask(None, {})
    assert (job, node, heavy) == ({"compute.gpu_count": 0}, {"gpu_count": 0}, [])
    assert nvml.read(None) is None


def test_a_driver_without_gpus(tmp_path: Path) -> None:
    """A machine that was looked at and has none has 0, and no list."""
    (job,), node, _ = ask(build_nvml(tmp_path, []), {})
    assert job == {"compute.gpu_count": 0}
    assert (node["gpu_count"], "gpus" in node, node["cuda_version"]) == (0, False, "12.4")


def test_torch_where_nvml_is_not(tmp_path: Path) -> None:
    """A GPU that only torch can speak to is told by torch, with its number where that is known."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert device_files(tmp_path)
    seen = (Gpu(0, None, "AMD Instinct MI300X", 192 * 2**30, 9, 4, 304), Gpu(1, None, "AMD"))

    def facts(environment: Mapping[str, str]) -> dict[str, Any]:
        asked: list[Mapping[str, str]] = []

        def ask_torch(environment: Mapping[str, str]) -> tuple[Gpu, ...]:
            asked.append(environment)
            return seen

        found = job_gpu_facts(environment, tmp_path, load_nvml=lambda: None, ask_torch=ask_torch)
        assert asked == [environment]
        return found

    job = facts({})
    assert job["compute.gpu_count"] == 2
    assert job["compute.gpu_type"] == "AMD Instinct MI300X"
    assert job["compute.gpus"][0] == {
        "index": 0,
        "name": "AMD Instinct MI300X",
        "total_memory_gb": 192.0,
        "major": 9,
        "minor": 4,
        "multi_processor_count": 304,
    }
    assert [gpu["index"] for gpu in facts(visible("6,4"))["compute.gpus"]] == [6, 4]
    assert ["index" in gpu for gpu in facts(visible("GPU-a,4"))["compute.gpus"]] == [False, True]
    assert node_gpu_facts(root=tmp_path, load_nvml=lambda: None) == {}


def test_torch_is_not_asked_in_vain(tmp_path: Path) -> None:
    """Where nothing shows a GPU, or the job has none, no process is started for it."""

    def never(_: Mapping[str, str]) -> None:
        raise AssertionError("torch was asked")

    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert job_gpu_facts({}, tmp_path, load_nvml=lambda: None, ask_torch=never) == {
        "compute.gpu_count": 0
    }
    (tmp_path / "dev/nvidia0").touch()
    for environment in (visible("-1"), {"SLURM_GPUS_PER_NODE": "0"}):
        facts = job_gpu_facts(environment, tmp_path, load_nvml=lambda: None, ask_torch=never)
        assert facts == {"compute.gpu_count": 0}


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """A driver that answers with bytes that are no UTF-8 has not answered."""
    (job,), _, _ = ask(build_nvml(tmp_path, [StubGpu(name="\udcff\udcfe")]), {})
    assert "name" not in job["compute.gpus"][0]
    assert "compute.gpu_type" not in job
