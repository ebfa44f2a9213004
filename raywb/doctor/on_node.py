"""What the doctor does on each node of a cluster, as a task there.

Ray is given this module's functions by value, so it works where raywb is not installed, which is
one of the things it finds out. Therefore it imports nothing of raywb at its top, and returns plain
values.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

__all__ = ["examine", "look_at_disk", "tell_time", "try_imports"]

#: Packages whose versions are compared.
PACKAGES = ("ray", "raywb", "wandb", "torch", "cosmos-xenna")

#: What is written to see whether a disk takes anything, in bytes.
TRIAL_BYTES = 65536

#: Longest that the modules may take to be imported, in seconds.
IMPORT_S = 40.0

#: Imports modules in a process of their own, and says which could not be.
_IMPORT = """
import importlib, json, sys
sys.path[:0] = json.loads(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    try:
        module = importlib.import_module(name)
        found[name] = [getattr(module, "__version__", None), None]
    except BaseException as error:
        found[name] = [None, f"{type(error).__name__}: {error}"[:300]]
sys.__stdout__.write("\\n" + json.dumps(found) + "\\n")
"""


def examine(request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Look around on this node.

    Args:
        request: ``variables`` (names whose values are told), ``modules`` (to be imported),
            ``head`` (id of the head node), ``directory`` (raywb's on the head, or None), ``wandb``
            (what is asked of W&B's server, from the head).

    Returns:
        The node's id, and the fields of :class:`raywb.doctor.look.NodeLook`.
    """
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    session_dir = str(ray._private.worker.global_worker.node.get_session_dir_path())
    is_head = node_id == request["head"]
    parts: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "processes": lambda: _processes(session_dir, is_head, request["variables"]),
        "imports": lambda: try_imports(request["modules"]),
        "disks": lambda: _disks(session_dir, is_head, request["directory"]),
    }
    if is_head:
        parts |= {"autoscales": _autoscales, "wandb": lambda: _wandb(request["wandb"])}
    found: dict[str, Any] = {"hostname": socket.gethostname()}
    failed = {}
    for name, look in parts.items():
        try:
            found[name] = look()
        except Exception as error:  # noqa: BLE001 - told as what it is; the others go on
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return node_id, found | {"failed": failed}


def tell_time() -> tuple[str, dict[str, Any]]:
    """This node's clock, in seconds since the epoch."""
    import ray

    return ray.get_runtime_context().get_node_id(), {"time_s": time.time()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # whether that matters is seen at the imports
    return found


def _environment(pid: int | str) -> dict[str, str]:
    """What a process was started with; what it has set itself does not show."""
    with open(f"/proc/{pid}/environ", "rb") as source:
        pairs = source.read().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _command(pid: int | str) -> str:
    with open(f"/proc/{pid}/cmdline", "rb") as source:
        return source.read().decode(errors="replace").replace("\0", " ")


def _raylet() -> int:
    """The process that all workers of this node descend from."""
    pid = os.getpid()
    while pid > 1:
        with open(f"/proc/{pid}/stat") as source:
            name, _, rest = source.read().rpartition(")")
        if name.endswith("(raylet"):
            return pid
        pid = int(rest.split()[1])
    raise LookupError("no raylet among the processes that started this one")


def _processes(
    session_dir: str, is_head: bool, variables: list[str]
) -> dict[str, dict[str, str | None]]:
    """Values of variables in Ray's own processes of this node; only these are read."""
    pids: dict[str, int | str] = {"raylet": _raylet()}
    session = os.path.basename(os.path.realpath(session_dir))
    for pid in filter(str.isdigit, os.listdir("/proc")) if is_head else ():
        try:
            command = _command(pid)
        except OSError:
            continue  # it has ended meanwhile
        if session not in command:
            continue
        for name, part in (("gcs_server", "/gcs_server "), ("dashboard", "/dashboard.py ")):
            if part in command:
                pids[name] = pid
    return {
        process: {name: values.get(name) for name in variables}
        for process, values in ((process, _environment(pid)) for process, pid in pids.items())
    }


def _autoscales() -> bool:
    """Whether nodes may come when they are wanted."""
    raylet = _raylet()
    if {"RAY_NODE_TYPE_NAME", "RAY_CLUSTER_NAME"} & _environment(raylet).keys():
        return True
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = _command(pid)
        except OSError:
            continue  # it has ended meanwhile
        if "/monitor.py " in command and "--autoscaling-config=" in command:
            return True
    return False


def try_imports(modules: list[str]) -> dict[str, Any]:
    """Each module's version and, if it cannot be imported by a worker here, why."""
    command = [sys.executable, "-c", _IMPORT, json.dumps(sys.path), *modules]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the imports were not done within {IMPORT_S:g} s") from None
    lines = done.stdout.strip().splitlines()
    if not lines:
        raise RuntimeError(f"the imports ended the process: {done.stderr.strip()[-200:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _disks(session_dir: str, is_head: bool, directory: str | None) -> list[dict[str, Any]]:
    """Where Ray and raywb write on this node."""
    started_with = _environment(_raylet())
    places = {"Ray's session directory": session_dir}
    if journals := started_with.get("RAYWB_JOURNAL_DIR"):
        places["the journals' directory"] = journals
    if is_head:
        places["raywb's directory"] = directory or started_with.get("RAYWB_DIR") or "~/raywb"
    return [look_at_disk(use, path) for use, path in places.items()]


def look_at_disk(use: str, path: str) -> dict[str, Any]:
    """How much room there is at a path, or at what would hold it, and whether it takes bytes."""
    there = os.path.abspath(os.path.expanduser(path))
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    usage = shutil.disk_usage(there)
    error = None
    try:
        with tempfile.TemporaryFile(dir=there) as trial:
            trial.write(bytes(TRIAL_BYTES))
            trial.flush()
    except OSError as refused:
        error = refused.strerror or str(refused)
    return {
        "use": use,
        "path": path,
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "error": error,
    }


def _wandb(request: dict[str, Any]) -> dict[str, Any]:
    """W&B's key and its server as the service sees them, which runs on the head."""
    from raywb.doctor.wandb_access import look_from_here

    return look_from_here(request)
