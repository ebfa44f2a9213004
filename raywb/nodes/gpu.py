"""Which GPUs a job was given, and which a machine has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raywb.nodes import nvml, slurm, torch_devices
from raywb.nodes.memory import gigabytes
from raywb.nodes.nvml import Gpu, Load

__all__ = ["device_files", "job_gpu_facts", "node_gpu_facts", "select", "visible_devices"]

AskTorch = Callable[[Mapping[str, str]], tuple[Gpu, ...] | None]

#: Device files that say that a GPU is here, though NVML is not: containers with "compute" but
#: without "utility" rights, AMD's (kfd), Jetson's, and Windows' own.
_DEVICE_FILE = re.compile(r"nvidia[0-9]+|kfd|nvhost-gpu|nvgpu|dxg")
_INDEX = re.compile(r"\+?([0-9]{1,6})")


def job_gpu_facts(
    environment: Mapping[str, str],
    root: Path = Path("/"),
    *,
    load_nvml: Load = nvml.load,
    ask_torch: AskTorch | None = None,
) -> dict[str, Any]:
    """``compute.gpu_count``, ``compute.gpu_type`` and ``compute.gpus`` of this job.

    The count comes from ``CUDA_VISIBLE_DEVICES``, else Slurm, else NVML, else torch. It is 0
    where it was looked at and there is none; where a device file shows a GPU that can be asked
    nothing, it is left out. ``index`` is the GPU's number on its machine.

    Args:
        environment: where ``CUDA_VISIBLE_DEVICES`` and Slurm's variables are looked for.
        root: directory that holds ``dev``.
        load_nvml: returns the ``pynvml`` module, or None.
        ask_torch: asks torch for the devices that an environment shows; by default in a process
            of its own, where one is installed.
    """
    entries = visible_devices(environment.get("CUDA_VISIBLE_DEVICES"))
    count = slurm.gpus_per_node(environment) if entries is None else len(entries)
    if count == 0:
        return {"compute.gpu_count": 0}
    ask_torch = ask_torch or _ask_installed_torch
    reading = nvml.read(load_nvml(), partitions=any(map(_is_partition, entries or ())))
    gpus: Sequence[Gpu] | None
    if reading is not None:
        gpus = select(reading.gpus, entries)
        if gpus:
            gpus = _with_processor_counts(gpus, ask_torch(environment) or ())
        count = reading.count if count is None else count
    else:
        gpus = _numbered(ask_torch(environment), entries) if device_files(root) else ()
        count = len(gpus) if count is None and gpus is not None else count
    return _facts("compute.", count, _certain(gpus or (), count), _job_device)


def node_gpu_facts(*, root: Path = Path("/"), load_nvml: Load = nvml.load) -> dict[str, Any]:
    """Every GPU of this machine, whoever may use it, with the versions of driver and CUDA.

    Keys: ``gpu_count``, ``gpu_type``, ``gpus``, ``driver_version``, ``cuda_version``.
    """
    reading = nvml.read(load_nvml())
    if reading is None:
        return {} if device_files(root) else {"gpu_count": 0}
    facts = _facts("", reading.count, reading.gpus, _node_device)
    versions = {"driver_version": reading.driver_version, "cuda_version": reading.cuda_version}
    return facts | _known(versions)


def visible_devices(text: str | None) -> list[str] | None:
    """The entries of ``CUDA_VISIBLE_DEVICES`` that count; None when it is not set.

    As in CUDA's programming guide: an entry is an index, the beginning of a GPU's UUID, or a MIG
    device; what is none of these (-1, Slurm's ``NoDevFiles``) ends the list. An entry that is
    there twice makes CUDA show no device at all.
    """
    if text is None:
        return None
    entries: list[str] = []
    for part in text.split(","):
        entry = part.strip()
        if index := _INDEX.match(entry):
            entry = str(int(index[1]))
        elif not entry.upper().startswith(("GPU-", "MIG-")):
            break
        if entry in entries:
            return []
        entries.append(entry)
    return entries


def select(gpus: Sequence[Gpu], entries: Sequence[str] | None) -> list[Gpu]:
    """The GPUs, or parts of them, that the entries name, in their order; None names all.

    As in CUDA, the first entry that names nothing, or more than one, ends the list. NVML counts
    in the order of PCI addresses; ``CUDA_DEVICE_ORDER`` may let CUDA count otherwise on machines
    with several kinds of GPU.
    """
    if entries is None:
        return list(gpus)
    selected: list[Gpu] = []
    for entry in entries:
        found = list(_named(gpus, entry))
        if len(found) != 1:
            break
        selected.append(found[0])
    return selected


def device_files(root: Path = Path("/")) -> bool:
    """Whether the machine has a device file of a GPU."""
    try:
        return any(_DEVICE_FILE.fullmatch(path.name) for path in (root / "dev").iterdir())
    except OSError:
        return False


def _is_partition(entry: str) -> bool:
    return entry.upper().startswith("MIG-")


def _named(gpus: Sequence[Gpu], entry: str) -> Iterator[Gpu]:
    wanted = entry.lower()
    for gpu in gpus:
        if entry.isdigit():
            if gpu.index == int(entry):
                yield gpu
        elif not _is_partition(entry):
            if gpu.uuid and gpu.uuid.lower().startswith(wanted):
                yield gpu
        else:
            for part in gpu.partitions:
                if _is_called(gpu, part, wanted):
                    yield replace(
                        gpu,
                        uuid=part.uuid,
                        name=part.name or gpu.name,
                        total_memory_bytes=part.total_memory_bytes,
                    )


def _is_called(gpu: Gpu, part: nvml.Partition, wanted: str) -> bool:
    """Whether a MIG device is meant: by the beginning of its UUID, or by its place in its GPU."""
    if part.uuid and part.uuid.lower().startswith(wanted):
        return True
    place = f"mig-{gpu.uuid}/{part.gpu_instance}/{part.compute_instance}"
    return place.lower() == wanted


def _ask_installed_torch(environment: Mapping[str, str]) -> tuple[Gpu, ...] | None:
    return torch_devices.ask(environment) if torch_devices.installed() else None


def _with_processor_counts(gpus: Sequence[Gpu], known: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs with torch's number of multiprocessors, where it is surely the same device.

    That is one with the same UUID, or, where torch tells none, the same place and name.
    """
    by_uuid = {_bare(gpu.uuid): gpu.multi_processor_count for gpu in known if gpu.uuid}
    counted: list[Gpu] = []
    for place, gpu in enumerate(gpus):
        count = by_uuid.get(_bare(gpu.uuid)) if gpu.uuid else None
        if not by_uuid and len(known) == len(gpus) and known[place].name == gpu.name:
            count = known[place].multi_processor_count
        counted.append(replace(gpu, multi_processor_count=count))
    return counted


def _bare(uuid: str | None) -> str:
    """A UUID without the kind in front of it, which torch does not write."""
    return re.sub("^(gpu|mig)-", "", (uuid or "").lower())


def _numbered(gpus: Sequence[Gpu] | None, entries: Sequence[str] | None) -> list[Gpu] | None:
    """torch's devices with their numbers on the machine, as far as the entries tell them."""
    if gpus is None or entries is None:
        return None if gpus is None else list(gpus)
    numbers = [int(entry) if entry.isdigit() else None for entry in entries]
    numbers += [None] * len(gpus)
    return [replace(gpu, index=number) for gpu, number in zip(gpus, numbers, strict=False)]


def _certain(gpus: Sequence[Gpu], count: int | None) -> Sequence[Gpu]:
    """The GPUs, if they are the job's: Slurm may have given it some of those in sight.

    Where all are alike, what is left unsaid is only their number on the machine.
    """
    if count is None or len(gpus) <= count:
        return gpus
    alike = {replace(gpu, index=None, uuid=None, partitions=()) for gpu in gpus}
    return [*alike] * count if len(alike) == 1 else ()


def _facts(
    prefix: str,
    count: int | None,
    gpus: Sequence[Gpu],
    describe: Callable[[Gpu], dict[str, Any]],
) -> dict[str, Any]:
    return _known(
        {
            f"{prefix}gpu_count": count,
            f"{prefix}gpu_type": gpus[0].name if gpus else None,
            f"{prefix}gpus": [describe(gpu) for gpu in gpus] or None,
        }
    )


def _job_device(gpu: Gpu) -> dict[str, Any]:
    return _known(
        {
            "index": gpu.index,
            "name": gpu.name,
            "total_memory_gb": gigabytes(gpu.total_memory_bytes),
            "major": gpu.major,
            "minor": gpu.minor,
            "multi_processor_count": gpu.multi_processor_count,
        }
    )


def _node_device(gpu: Gpu) -> dict[str, Any]:
    return _job_device(gpu) | _known({"uuid": gpu.uuid})


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}
