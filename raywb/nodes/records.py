"""What is known of each node of a cluster, and what the nodes amount to together; no I/O.

Aggregates go into a run's config, so their size does not grow with the cluster: however many
nodes there are, GPUs are counted by type, and kinds and versions are listed up to a limit.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from raywb.nodes.memory import gigabytes

__all__ = [
    "TABLE_COLUMNS",
    "NodeRecord",
    "SeenNode",
    "series_name",
    "summarize",
    "table_rows",
    "version_skew",
]

#: Kinds of GPU, and versions of one package, that are listed; the others are summed up.
MOST_LISTED = 12

#: Nodes that are named in one warning.
MOST_NAMED = 3

#: What stands beside the nodes in ``nodes/…``.
NAMES_OF_SERIES = ("mean", "min", "max")

_NO_KEY = re.compile(r"[^A-Za-z0-9_.\-]+")


class SeenNode(msgspec.Struct, frozen=True, kw_only=True):
    """A living node as Ray tells it, without anything having been asked of the node itself.

    Attributes:
        ip: ``NodeManagerAddress``.
        resources: Ray's own, as the node was started with; memory in bytes.
        metrics_port: where the node's agent answers at ``/metrics``; 0 where there is none.
    """

    node_id: str
    hostname: str
    ip: str
    is_head: bool = False
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    metrics_port: int = 0


class NodeRecord(msgspec.Struct, kw_only=True):
    """One node of the cluster, from when it was first seen.

    Attributes:
        name: its name among the series of a run; nodes of one hostname have different ones.
        seen: as Ray told it last.
        joined_s: when it was first seen, in seconds since the epoch.
        left_s: when it was first seen to be gone.
        facts: what its probe brought: see :func:`raywb.nodes.node.collect_node_facts`.
        attempts: probes that were sent to it.
        error: why the last of them brought nothing.
    """

    name: str
    seen: SeenNode
    joined_s: float
    left_s: float | None = None
    facts: dict[str, Any] | None = None
    attempts: int = 0
    error: str | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it is part of the cluster now."""
        return self.left_s is None

    @property
    def cpu_count(self) -> float:
        """CPUs of the node: its own, or those that its container may use, or else Ray's."""
        return self._fact("cpu_limit", "cpu_count") or self.seen.resources.get("CPU", 0.0)

    @property
    def memory_gb(self) -> float:
        """Memory of the node, or what its container may use, or else what Ray hands out."""
        handed_out = gigabytes(int(self.seen.resources.get("memory", 0.0))) or 0.0
        return self._fact("memory_limit_gb", "memory_gb") or handed_out

    @property
    def gpu_count(self) -> int:
        """GPUs of the node; where its probe cannot tell, those that Ray hands out."""
        count = (self.facts or {}).get("gpu_count")
        return int(self.seen.resources.get("GPU", 0.0) if count is None else count)

    @property
    def gpu_types(self) -> Counter[str]:
        """The node's GPUs by the name of their model; ``unknown`` where nobody tells it."""
        named = [gpu.get("name", "unknown") for gpu in (self.facts or {}).get("gpus", ())]
        types = Counter(named)
        if (missing := self.gpu_count - types.total()) > 0:
            types[(self.facts or {}).get("gpu_type", "unknown")] += missing
        return types

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Python and of packages on the node."""
        return dict((self.facts or {}).get("versions", {}))

    def _fact(self, *names: str) -> float:
        return next((self.facts[name] for name in names if name in (self.facts or {})), 0.0)  # type: ignore[index]


def series_name(seen: SeenNode, taken: Collection[str]) -> str:
    """A name for the node's series: its hostname, told from that of another living node.

    A node that comes in the place of one that has left goes on with that one's series.
    """
    name = _NO_KEY.sub("_", seen.hostname or seen.ip) or "node"
    is_free = name not in taken and name not in NAMES_OF_SERIES
    return name if is_free else f"{name}-{seen.node_id[:8]}"


def _limited(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent ones, and the sum of the others."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = dict(ordered[:MOST_LISTED])
    if len(ordered) > MOST_LISTED:
        shown["others"] = sum(count for _, count in ordered[MOST_LISTED:])
    return shown


def _versions(records: Iterable[NodeRecord]) -> dict[str, Counter[str]]:
    """By package, on how many living nodes there is which version.

    How PyTorch was built (``+cu128``, ``+cpu``) is no difference of its version.
    """
    found: dict[str, Counter[str]] = {}
    for record in records:
        if record.is_alive:
            for package, version in record.versions.items():
                found.setdefault(package, Counter())[version.partition("+")[0]] += 1
    return found


def summarize(records: Collection[NodeRecord]) -> dict[str, Any]:
    """The cluster in a few numbers, for a run's config; bounded in size.

    Returns:
        ``node_count``, ``cpu_count``, ``memory_gb``, ``gpu_count``, ``gpus`` (by type), all of
        the nodes that are there now; ``nodes_left`` (since the service began),
        ``nodes_unprobed`` (counted with what Ray says of them), ``ray`` (the CPUs, GPUs and
        memory that Ray hands out) and ``versions``: one for each package, or, where nodes
        differ, how many nodes have which.
    """
    alive = [record for record in records if record.is_alive]
    types: Counter[str] = sum((record.gpu_types for record in alive), Counter())
    versions = {
        package: _limited(counts) if len(counts) > 1 else next(iter(counts))
        for package, counts in sorted(_versions(alive).items())
    }
    resources: Counter[str] = Counter()
    for record in alive:
        resources.update({name: record.seen.resources.get(name, 0.0) for name in RAY_RESOURCES})
    return {
        "node_count": len(alive),
        "cpu_count": round(sum(record.cpu_count for record in alive), 2),
        "memory_gb": round(sum(record.memory_gb for record in alive), 2),
        "gpu_count": sum(record.gpu_count for record in alive),
        "gpus": _limited(types),
        "nodes_left": len(records) - len(alive),
        "nodes_unprobed": sum(record.facts is None for record in alive),
        "ray": {
            "cpu_count": resources["CPU"],
            "gpu_count": resources["GPU"],
            "memory_gb": gigabytes(int(resources["memory"])),
        },
        "versions": versions,
    }


#: Ray's resources that are summed up.
RAY_RESOURCES = ("CPU", "GPU", "memory")


def version_skew(records: Collection[NodeRecord]) -> dict[str, str]:
    """By package, a sentence on nodes that have another version of it than most."""
    warnings = {}
    for package, counts in sorted(_versions(records).items()):
        if len(counts) < 2:
            continue
        usual = max(counts, key=lambda version: (counts[version], version))
        named = sorted(
            record.name
            for record in records
            if record.is_alive and record.versions.get(package, usual).partition("+")[0] != usual
        )
        have = ", ".join(
            f"{version} on {_nodes(count)}" for version, count in _limited(counts).items()
        )
        more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        where = ", ".join(named[:MOST_NAMED])
        warnings[package] = f"nodes differ in {package}: {have} ({where}{more})"
    return warnings


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


#: What a table of nodes says of each.
TABLE_COLUMNS = [
    "node",
    "node_id",
    "ip",
    "state",
    "joined",
    "left",
    "cpus",
    "cpu_limit",
    "memory_gb",
    "memory_limit_gb",
    "gpus",
    "gpu_type",
    "driver",
    "cuda",
    "disk_gb",
    "instance_type",
    "market_type",
    "zone",
    "container",
    "python",
    "ray",
    "raywb",
    "torch",
    "wandb",
    "platform",
    "resources",
    "labels",
    "problem",
]


def table_rows(records: Iterable[NodeRecord]) -> list[list[Any]]:
    """A row for each node, those that are there first, in the order of ``TABLE_COLUMNS``."""
    ordered = sorted(records, key=lambda one: (not one.is_alive, -(one.left_s or 0.0), one.name))
    return [_table_row(record) for record in ordered]


def _table_row(record: NodeRecord) -> list[Any]:
    seen, facts = record.seen, record.facts or {}
    cloud, versions = facts.get("cloud", {}), facts.get("versions", {})
    container = facts.get("container", {})
    state = "left" if not record.is_alive else "head" if seen.is_head else "worker"
    return [
        record.name,
        seen.node_id,
        seen.ip,
        state,
        _iso(record.joined_s),
        _iso(record.left_s),
        facts.get("cpu_count"),
        facts.get("cpu_limit"),
        facts.get("memory_gb"),
        facts.get("memory_limit_gb"),
        record.gpu_count,
        ", ".join(_limited(record.gpu_types)) or None,
        facts.get("driver_version"),
        facts.get("cuda_version"),
        facts.get("disk_total_gb"),
        cloud.get("instance_type") or cloud.get("node_type"),
        cloud.get("market_type"),
        cloud.get("zone"),
        container.get("image") or container.get("runtime"),
        *(versions.get(name) for name in ("python", "ray", "raywb", "torch", "wandb")),
        facts.get("platform"),
        _pairs(seen.resources),
        _pairs({key: value for key, value in seen.labels.items() if key != "ray.io/node-id"}),
        record.error,
    ]


def _pairs(values: Mapping[str, Any]) -> str:
    """What a node was started with, as one text; every node has its own address as a resource."""
    kept = {key: value for key, value in values.items() if not key.startswith("node:")}
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in sorted(kept.items())
    )


def _iso(time_s: float | None) -> str | None:
    if time_s is None:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))
