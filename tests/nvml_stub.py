"""NVIDIA's driver library for machines without a GPU: a ``libnvidia-ml.so.1`` that is made here.

It answers the calls with which ``pynvml`` looks for devices, so that the real module runs on the
real ctypes path. A process sees it through ``LD_LIBRARY_PATH``, which it must have at its start:

    folder = build_nvml(tmp_path, [StubGpu(), StubGpu()])
    answers = ask_nvml(folder, "import pynvml; pynvml.nvmlInit(); …; print(json.dumps(…))")
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "DRIVER_NOT_LOADED",
    "GPU_IS_LOST",
    "NOT_SUPPORTED",
    "VERSION_MISMATCH",
    "StubGpu",
    "StubPartition",
    "ask_nvml",
    "build_nvml",
]

REPOSITORY = Path(__file__).parent.parent

#: NVML's return codes (``nvmlReturn_t``).
NOT_SUPPORTED, NOT_FOUND, DRIVER_NOT_LOADED, GPU_IS_LOST, VERSION_MISMATCH = 3, 6, 9, 15, 18


@dataclass(frozen=True)
class StubPartition:
    """A part of a GPU that MIG made a device of its own."""

    uuid: str
    gpu_instance: int
    compute_instance: int = 0
    name: str = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    memory_bytes: int = 5 * 2**30


@dataclass(frozen=True)
class StubGpu:
    """One device; ``lost`` fell off the bus, and without ``memory_bytes`` it shares the host's."""

    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    name: str = "NVIDIA H100 80GB HBM3"
    memory_bytes: int | None = 80 * 2**30
    major: int = 9
    minor: int = 0
    lost: bool = False
    partitions: Sequence[StubPartition] = ()


def build_nvml(
    folder: Path,
    gpus: Sequence[StubGpu],
    *,
    driver_version: str = "550.54.15",
    cuda_version: int = 12040,
    init_code: int = 0,
    without: Collection[str] = (),
) -> Path:
    """Compile a library that reports these GPUs into a folder, and return the folder.

    Args:
        folder: where it goes; made if it is not there.
        gpus: the devices in the order of their index.
        driver_version: what the driver calls itself.
        cuda_version: a thousand times the major version plus ten times the minor one.
        init_code: what ``nvmlInit`` returns instead of success.
        without: names of functions that the library does not have, as an old driver.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the stub of NVIDIA's library cannot be made")
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "nvml_stub.c"
    functions = {key: text for key, text in _FUNCTIONS.items() if key not in without}
    source.write_text(
        _tables(gpus, driver_version, cuda_version, init_code) + "".join(functions.values())
    )
    library = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return folder


def ask_nvml(
    library: Path | None, program: str, *, environment: Mapping[str, str] | None = None
) -> Any:
    """What a Python program prints as JSON that runs with this library, or with none."""
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    if library is not None:
        base["LD_LIBRARY_PATH"] = str(library)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=base | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _literal(text: str) -> str:
    """A C string of the text's bytes; lone surrogates stand for bytes that are no UTF-8."""
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode("utf-8", "surrogateescape")) + '"'


def _tables(gpus: Sequence[StubGpu], driver_version: str, cuda_version: int, init_code: int) -> str:
    """The C source's data. A GPU's handle is its index + 1, a partition's its place + 1001."""
    devices, partitions = [], []
    for index, gpu in enumerate(gpus):
        memory = 0 if gpu.memory_bytes is None else gpu.memory_bytes
        devices.append(
            f"{{{_literal(gpu.name)}, {_literal(gpu.uuid)}, {memory}ULL, "
            f"{gpu.major}, {gpu.minor}, {int(gpu.lost)}, {index}, 0, 0}}"
        )
        partitions += [
            f"{{{_literal(part.name)}, {_literal(part.uuid)}, {part.memory_bytes}ULL, "
            f"0, 0, 0, {index}, {part.gpu_instance}, {part.compute_instance}}}"
            for part in gpu.partitions
        ]
    empty = '{"", "", 0, 0, 0, 0, -1, 0, 0}'
    return f"""
#include <stdio.h>
#include <string.h>
typedef struct {{
    const char *name, *uuid; unsigned long long memory; int major, minor, lost, gpu, gi, ci;
}} device;
static const device gpus[] = {{{", ".join([*devices, empty])}}};
static const device parts[] = {{{", ".join([*partitions, empty])}}};
#define GPUS {len(devices)}
#define PARTS {len(partitions)}
#define MIG_PLACES 7
#define DRIVER {_literal(driver_version)}
#define CUDA {cuda_version}
#define INIT_CODE {init_code}
static const device *get(void *handle) {{
    long number = (long)handle;
    return number > 1000 ? &parts[number - 1001] : &gpus[number - 1];
}}
static int put(char *to, unsigned room, const char *text) {{
    if (strlen(text) >= room) return 7;
    strcpy(to, text);
    return 0;
}}
"""


#: The library's functions by name: NVML API reference, "Device Queries" and "System Queries".
_FUNCTIONS = {
    "nvmlInit": """
int nvmlInitWithFlags(unsigned flags) { return INIT_CODE; }
int nvmlInit_v2(void) { return INIT_CODE; }
""",
    "nvmlShutdown": "int nvmlShutdown(void) { return 0; }\n",
    "nvmlErrorString": 'const char *nvmlErrorString(int code) { return "stub error"; }\n',
    "nvmlSystemGetDriverVersion": """
int nvmlSystemGetDriverVersion(char *to, unsigned room) { return put(to, room, DRIVER); }
""",
    "nvmlSystemGetCudaDriverVersion": """
int nvmlSystemGetCudaDriverVersion(int *version) { *version = CUDA; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = CUDA; return 0; }
""",
    "nvmlDeviceGetCount": """
int nvmlDeviceGetCount_v2(unsigned *count) { *count = GPUS; return 0; }
""",
    "nvmlDeviceGetHandleByIndex": """
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index >= GPUS) return 2;
    if (gpus[index].lost) return 15;
    *handle = (void *)(long)(index + 1);
    return 0;
}
""",
    "nvmlDeviceGetHandleByUUID": """
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    for (long i = 0; i < GPUS; i++)
        if (!strcmp(uuid, gpus[i].uuid)) { *handle = (void *)(i + 1); return 0; }
    for (long i = 0; i < PARTS; i++)
        if (!strcmp(uuid, parts[i].uuid)) { *handle = (void *)(i + 1001); return 0; }
    return 6;
}
""",
    "nvmlDeviceGetIndex": """
int nvmlDeviceGetIndex(void *handle, unsigned *index) { *index = get(handle)->gpu; return 0; }
""",
    "nvmlDeviceGetName": """
int nvmlDeviceGetName(void *handle, char *to, unsigned room) {
    return put(to, room, get(handle)->name);
}
""",
    "nvmlDeviceGetUUID": """
int nvmlDeviceGetUUID(void *handle, char *to, unsigned room) {
    return put(to, room, get(handle)->uuid);
}
""",
    "nvmlDeviceGetMemoryInfo": """
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    if (!get(handle)->memory) return 3;
    memory[0] = memory[1] = get(handle)->memory;
    memory[2] = 0;
    return 0;
}
""",
    # What Ray's own agent asks for: a GPU is as busy as its index says, and nobody is on it.
    "nvmlDeviceGetUtilizationRates": """
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *percent) {
    percent[0] = percent[1] = 40 * get(handle)->gpu;
    return 0;
}
""",
    "nvmlDeviceGetComputeRunningProcesses": """
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, void *processes) {
    *count = 0;
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, void *processes) {
    *count = 0;
    return 0;
}
""",
    "nvmlDeviceGetGraphicsRunningProcesses": """
int nvmlDeviceGetGraphicsRunningProcesses_v2(void *handle, unsigned *count, void *processes) {
    *count = 0;
    return 0;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, void *processes) {
    *count = 0;
    return 0;
}
""",
    "nvmlDeviceGetCudaComputeCapability": """
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    if ((long)handle > 1000) return 2;
    *major = get(handle)->major;
    *minor = get(handle)->minor;
    return 0;
}
""",
    "nvmlDeviceGetMigMode": """
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    *current = 0;
    for (int i = 0; i < PARTS; i++) *current |= parts[i].gpu == get(handle)->gpu;
    *pending = *current;
    return 0;
}
""",
    "nvmlDeviceGetMaxMigDeviceCount": """
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    *count = MIG_PLACES;
    return 0;
}
""",
    # Every other place is empty, as on a GPU from which parts were taken away again.
    "nvmlDeviceGetMigDeviceHandleByIndex": """
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **part) {
    int place = 0;
    for (long i = 0; i < PARTS; i++)
        if (parts[i].gpu == get(handle)->gpu && (place += 2) == index + 1) {
            *part = (void *)(i + 1001);
            return 0;
        }
    return 6;
}
""",
    "nvmlDeviceGetGpuInstanceId": """
int nvmlDeviceGetGpuInstanceId(void *handle, unsigned *id) { *id = get(handle)->gi; return 0; }
""",
    "nvmlDeviceGetComputeInstanceId": """
int nvmlDeviceGetComputeInstanceId(void *handle, unsigned *id) {
    *id = get(handle)->ci;
    return 0;
}
""",
    "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": """
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *part, void **handle) {
    *handle = (void *)(long)(get(part)->gpu + 1);
    return 0;
}
""",
}
