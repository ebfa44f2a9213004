"""What torch knows of the GPUs and NVML does not, asked in a process of its own.

torch is never imported here: its CUDA part would leave a context in the user's process, and a
process that has touched CUDA cannot fork workers that use it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import subprocess
import sys
from collections.abc import Mapping

from raywb.nodes.nvml import Gpu

__all__ = ["TIMEOUT_S", "ask", "installed"]

_log = logging.getLogger(__name__)

#: How long torch may take for its import and its answer before it counts as not to be had.
TIMEOUT_S = 10.0
#: How long a process that was killed may take to be gone, before it is left to itself.
_REAP_S = 1.0

_MARK = "raywb-devices:"

#: Variables that decide what torch sees, and which torch that is.
_DECIDING = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
)

#: What was answered in this process's life, by interpreter and deciding variables.
_answers: dict[tuple[str | None, ...], tuple[Gpu, ...] | None] = {}

#: What the process runs. Older torches tell no ``uuid``.
_PROGRAM = f"""
import json, torch
found = []
for ordinal in range(torch.cuda.device_count()):
    device = torch.cuda.get_device_properties(ordinal)
    uuid = getattr(device, "uuid", None)
    found.append([
        ordinal,
        None if uuid is None else str(uuid),
        device.name,
        device.total_memory,
        device.major,
        device.minor,
        device.multi_processor_count,
    ])
print({_MARK!r} + json.dumps(found), flush=True)
"""


def installed() -> bool:
    """Whether there is a torch that may know of GPUs; it is not imported."""
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def ask(
    environment: Mapping[str, str],
    *,
    python: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[Gpu, ...] | None:
    """The devices that torch sees in this environment, which decides which are visible.

    ``index`` is torch's own: the place among the visible devices. The answer, also that there is
    none, is kept for the life of the process.

    Args:
        environment: the environment of the process that is asked.
        python: the interpreter; by default this one's.
        timeout_s: how long it may take.

    Returns:
        None when torch cannot be asked, or does not answer in time.
    """
    python = python or sys.executable
    if not python:
        return None
    key = (python, *(environment.get(name) for name in _DECIDING))
    if key not in _answers:
        _answers[key] = _run(python, environment, timeout_s)
    return _answers[key]


def _run(python: str, environment: Mapping[str, str], timeout_s: float) -> tuple[Gpu, ...] | None:
    try:
        process = subprocess.Popen(
            [python, "-P", "-c", _PROGRAM],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        _log.debug("torch cannot be asked for the GPUs: %s", error)
        return None
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return _parse(output.decode("utf-8", "replace"))
    except subprocess.TimeoutExpired:
        _log.debug("torch did not tell the GPUs within %g s", timeout_s)
        return None
    finally:
        if process.poll() is None:
            process.kill()
            # A process that hangs in the driver cannot be killed; nobody waits for it here.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_REAP_S)


def _parse(output: str) -> tuple[Gpu, ...] | None:
    """The devices from the marked line; whatever else torch prints is passed over."""
    lines = [line for line in output.splitlines() if line.startswith(_MARK)]
    try:
        return tuple(Gpu(*device) for device in json.loads(lines[0].removeprefix(_MARK)))
    except (LookupError, TypeError, ValueError) as error:
        _log.debug("torch's answer cannot be read: %r", error)
        return None
