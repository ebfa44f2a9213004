"""The limits that cgroups v1 and v2 set on this process, and on those that it lies in.

Where to look is in ``/proc/self/cgroup`` (the process's place in each hierarchy) and
``/proc/self/mountinfo`` (which part of each hierarchy is mounted where), see ``cgroups(7)`` and
``proc(5)``. A container may see its own cgroup as the top of the hierarchy, or be given a path
that is not mounted at all: then the mounted part is its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from raywb.nodes.files import read_text

__all__ = ["cpu_limit", "memory_limit_bytes"]

#: The period of a CPU quota where none is written, in microseconds (the kernel's default).
DEFAULT_PERIOD_US = 100_000

_NUMBER = re.compile(r"[0-9]{1,20}")
_OCTAL = re.compile(r"\\([0-7]{3})")


class _Mount(NamedTuple):
    """A mounted hierarchy: the part of it that is shown, where, and its controllers (v2: none)."""

    top: str
    point: str
    controllers: frozenset[str]
    version: int


#: Where the hierarchies are found on a machine that does not show what is mounted.
_USUAL_MOUNTS = (
    _Mount("/", "/sys/fs/cgroup", frozenset(), 2),
    _Mount("/", "/sys/fs/cgroup/memory", frozenset({"memory"}), 1),
    _Mount("/", "/sys/fs/cgroup/cpu", frozenset({"cpu"}), 1),
)


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """The tightest memory limit of this process's cgroup and its ancestors, as it is written.

    It may be larger than the machine: v1 says "no limit" with a huge number.

    Args:
        root: directory that holds ``proc`` and ``sys``.
    """
    limits: list[int] = []
    for folder in _folders(root, "memory"):
        names = ("memory.max", "memory.limit_in_bytes")
        limits += [_number(read_text(folder / name)) or 0 for name in names]
        # v1's own sum over the ancestors knows those, too, that a container does not see.
        statistics = read_text(folder / "memory.stat") or ""
        if found := re.search(r"^hierarchical_memory_limit ([0-9]{1,20})$", statistics, re.M):
            limits.append(int(found[1]))
    return min((limit for limit in limits if limit > 0), default=None)


def cpu_limit(root: Path = Path("/")) -> float | None:
    """The tightest CPU quota of this process's cgroup and its ancestors, in CPUs.

    Args:
        root: directory that holds ``proc`` and ``sys``.
    """
    limits: list[float] = []
    for folder in _folders(root, "cpu"):
        quota, _, period = (read_text(folder / "cpu.max") or "").strip().partition(" ")
        limits += _cpus(quota, period)
        limits += _cpus(
            read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
        )
    return min(limits, default=None)


def _cpus(quota: str | None, period: str | None) -> list[float]:
    """The CPUs that a quota comes to, if it is one: neither ``max`` nor -1."""
    quota_us, period_us = _number(quota), _number(period) or DEFAULT_PERIOD_US
    return [quota_us / period_us] if quota_us else []


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if _NUMBER.fullmatch(text) else None


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's directory in each hierarchy that may limit it, then those above it."""
    places = dict(_places(read_text(root / "proc/self/cgroup") or ""))
    mounts = list(_mounts(read_text(root / "proc/self/mountinfo") or ""))
    for mount in mounts or _USUAL_MOUNTS:
        if mount.version == 1 and controller not in mount.controllers:
            continue
        place = places.get(controller if mount.version == 1 else "", "/")
        names = _below(place, mount.top)
        point = root / mount.point.lstrip("/")
        for depth in range(len(names), -1, -1):
            yield point.joinpath(*names[:depth])


def _places(text: str) -> Iterator[tuple[str, str]]:
    """Each controller's path from lines like ``4:cpu,cpuacct:/a/b``; v2's under the empty name."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon:
            continue
        for name in controllers.split(","):
            if name or number == "0":
                yield name, path


def _below(place: str, top: str) -> list[str]:
    """The names on the way from a mount's top to a place; none where it is not below it.

    A place outside of the process's cgroup namespace is written with ``..``: it is not mounted.
    """
    names = [name for name in place.split("/") if name and name != "."]
    above = [name for name in top.split("/") if name]
    if ".." in names or names[: len(above)] != above:
        return []
    return names[len(above) :]


def _mounts(text: str) -> Iterator[_Mount]:
    """The cgroup hierarchies among the lines of a mountinfo file."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        top, point = (_OCTAL.sub(lambda code: chr(int(code[1], 8)), name) for name in fields[3:5])
        version = 2 if kind[0] == "cgroup2" else 1
        controllers = frozenset() if version == 2 else frozenset(kind[2].split(","))
        yield _Mount(top, point, controllers, version)
