"""NVIDIA's management library (NVML): which GPUs there are, without touching CUDA.

Each reading is asked for by itself: a device that does not answer one question (shared memory,
a GPU that fell off the bus) still answers the others.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Gpu", "Load", "Partition", "Reading", "load", "read"]

_log = logging.getLogger(__name__)

#: Returns the ``pynvml`` module, or None where there is no NVIDIA driver.
Load = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of a GPU that MIG made a device of its own; what it does not say is None."""

    uuid: str | None
    gpu_instance: int | None
    compute_instance: int | None
    name: str | None
    total_memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or the part of one that was allotted; what it does not say is None."""

    index: int | None
    uuid: str | None = None
    name: str | None = None
    total_memory_bytes: int | None = None
    major: int | None = None
    minor: int | None = None
    multi_processor_count: int | None = None
    partitions: tuple[Partition, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What NVML says of a machine.

    Attributes:
        count: how many GPUs there are; ``gpus`` lacks those that cannot be spoken to.
        gpus: the GPUs in NVML's order, which is that of their PCI addresses.
        driver_version: such as ``550.54.15``.
        cuda_version: the newest CUDA that the driver runs, such as ``12.4``.
    """

    count: int
    gpus: tuple[Gpu, ...]
    driver_version: str | None
    cuda_version: str | None


def load() -> Any:
    """The ``pynvml`` module; None where the driver's library, or the module, is not installed."""
    try:
        # The library is looked for first: importing the module takes far longer than this does.
        ctypes.CDLL("libnvidia-ml.so.1")
        import pynvml
    except (ImportError, OSError):
        return None
    return pynvml


def read(nvml: Any, *, partitions: bool = False) -> Reading | None:
    """Ask the library for everything; None where there is none, or it does not work.

    Args:
        nvml: what :func:`load` returned.
        partitions: whether to list the parts that MIG made of the GPUs.
    """
    if nvml is None:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        _log.debug("NVML is installed and does not work: %s", error)
        return None
    try:
        count = _ask(nvml, nvml.nvmlDeviceGetCount)
        if count is None:
            return None
        cuda = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        return Reading(
            count=count,
            gpus=tuple(_gpus(nvml, count, partitions)),
            driver_version=_ask(nvml, nvml.nvmlSystemGetDriverVersion),
            # 12040 is 12.4: a thousand times the major version, ten times the minor one.
            cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
        )
    finally:
        _ask(nvml, nvml.nvmlShutdown)


def _ask(nvml: Any, question: Callable[..., Any], *about: Any) -> Any:
    """The answer; None where the library has none. A string that is no UTF-8 is none, either."""
    try:
        return question(*about)
    except (nvml.NVMLError, UnicodeDecodeError) as error:
        _log.debug("NVML does not answer %s: %s", question.__name__, error)
        return None


def _gpus(nvml: Any, count: int, partitions: bool) -> Iterator[Gpu]:
    for index in range(count):
        handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
        capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
        yield Gpu(
            index=index,
            uuid=_ask(nvml, nvml.nvmlDeviceGetUUID, handle),
            name=_ask(nvml, nvml.nvmlDeviceGetName, handle),
            total_memory_bytes=int(memory.total) if memory else None,
            major=capability[0] if capability else None,
            minor=capability[1] if capability else None,
            partitions=tuple(_partitions(nvml, handle)) if partitions else (),
        )


def _partitions(nvml: Any, gpu: Any) -> Iterator[Partition]:
    for index in range(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0):
        part = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, index)
        if part is None:
            continue  # the places for parts are numbered, and need not be taken
        memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, part)
        yield Partition(
            uuid=_ask(nvml, nvml.nvmlDeviceGetUUID, part),
            gpu_instance=_ask(nvml, nvml.nvmlDeviceGetGpuInstanceId, part),
            compute_instance=_ask(nvml, nvml.nvmlDeviceGetComputeInstanceId, part),
            name=_ask(nvml, nvml.nvmlDeviceGetName, part),
            total_memory_bytes=int(memory.total) if memory else None,
        )
