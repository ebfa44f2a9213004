"""How busy each node is, as Ray's own agent on it tells: no agent of ours, nothing to wake.

Every node's agent answers at ``http://<ip>:<MetricsExportPort>/metrics`` in Prometheus' text
format. Most of that text is about Ray's own calls; only the lines that are wanted are kept, while
it arrives. A node that does not answer in time is a gap in its series, never a zero.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from raywb.nodes.memory import BYTES_PER_GB

__all__ = ["NodeEndpoint", "Reading", "metrics_of", "parse_metrics", "read_nodes"]

#: Nodes that are read at the same time.
AT_ONCE = 16

#: Longest that one node may take to answer, in seconds.
NODE_TIMEOUT_S = 5.0

#: Largest answer that is read; a node with hundreds of workers has some megabytes.
MAX_ANSWER_BYTES = 32 * 1024 * 1024

#: Longest line that is read.
MAX_LINE_BYTES = 64 * 1024

#: With more nodes than this, a row has means and extremes, and no values of single nodes.
MAX_SERIES_NODES = 64

#: A GPU whose utilization is below this is idle, in percent.
IDLE_GPU_PERCENT = 5.0

#: Bytes of what Ray calls the memory of a GPU: it counts in MiB, whatever its documentation says.
GPU_MEMORY_UNIT_BYTES = 1024**2

_MB = 1e6

#: Ray's names without their suffixes; lines of others are passed over.
_WANTED = (b"ray_node_", b"ray_object_store_used_memory", b"ray_object_store_available_memory")


class NodeEndpoint(NamedTuple):
    """Where a node's agent answers, and the node's name among the series."""

    name: str
    ip: str
    port: int


class Reading(NamedTuple):
    """What one node's agent said.

    Attributes:
        values: by the key below the node's own prefix.
        gpus_percent: utilization of each GPU whose driver tells it.
    """

    values: dict[str, float]
    gpus_percent: list[float]


class _Series:
    """The samples of an answer, by name."""

    def __init__(self, text: str) -> None:
        self._by_name: dict[str, list[float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._by_name.setdefault(sample.name, []).append(sample.value)

    def all(self, name: str) -> list[float]:
        return self._by_name.get(f"ray_{name}", [])

    def total(self, name: str) -> float | None:
        """The sum over whatever Ray splits a value by; None where it says nothing."""
        values = self.all(name)
        return sum(values) if values else None


def parse_metrics(text: str) -> Reading:
    """The utilization of a node, from what its agent answers.

    Values: ``cpu_percent``, ``memory_used_gb``, ``memory_percent``, ``disk_percent``,
    ``disk_read_mb_per_s``, ``disk_write_mb_per_s``, ``network_sent_mb_per_s``,
    ``network_received_mb_per_s``, ``object_store_used_gb``, ``object_store_percent``; with GPUs
    also ``gpu_percent`` (their mean), ``gpu_memory_used_gb``, ``gpu_memory_percent`` and
    ``gpus_idle``. GB are of 2³⁰ bytes, MB of 10⁶. What the agent does not say is left out.

    Raises:
        ValueError: it is not in Prometheus' text format.
    """
    series = _Series(text)
    # Where the driver does not tell, as for parts of a GPU that MIG made, Ray says -1.
    gpus_percent = [percent for percent in series.all("node_gpus_utilization") if percent >= 0]
    unit_gb = GPU_MEMORY_UNIT_BYTES / BYTES_PER_GB
    gpu_used, gpu_free = series.total("node_gram_used"), series.total("node_gram_available")
    store_used = series.total("object_store_used_memory")
    store_free = series.total("object_store_available_memory")
    memory_used = series.total("node_mem_used")
    values = {
        "cpu_percent": series.total("node_cpu_utilization"),
        "memory_used_gb": _scaled(memory_used, 1 / BYTES_PER_GB),
        "memory_percent": _percent(memory_used, series.total("node_mem_total")),
        "disk_percent": series.total("node_disk_utilization_percentage"),
        "disk_read_mb_per_s": _scaled(series.total("node_disk_io_read_speed"), 1 / _MB),
        "disk_write_mb_per_s": _scaled(series.total("node_disk_io_write_speed"), 1 / _MB),
        "network_sent_mb_per_s": _scaled(series.total("node_network_send_speed"), 1 / _MB),
        "network_received_mb_per_s": _scaled(series.total("node_network_receive_speed"), 1 / _MB),
        "object_store_used_gb": _scaled(store_used, 1 / BYTES_PER_GB),
        "object_store_percent": _percent(store_used, _sum(store_used, store_free)),
        "gpu_memory_used_gb": _scaled(gpu_used, unit_gb),
        "gpu_memory_percent": _percent(gpu_used, _sum(gpu_used, gpu_free)),
    }
    if gpus_percent:
        values["gpu_percent"] = statistics.fmean(gpus_percent)
        values["gpus_idle"] = float(_idle(gpus_percent))
    known = {key: round(value, 4) for key, value in values.items() if value is not None}
    return Reading(known, gpus_percent)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100.0 * part / whole


def _idle(gpus_percent: Iterable[float]) -> int:
    return sum(percent < IDLE_GPU_PERCENT for percent in gpus_percent)


def metrics_of(readings: Mapping[str, Reading], alive: int) -> dict[str, float]:
    """The row of one interval: ``nodes/<name>/…`` for each node, and the cluster's means.

    A mean is over the nodes that have the value. Above ``MAX_SERIES_NODES`` living nodes there
    are ``nodes/mean/…``, ``nodes/min/…`` and ``nodes/max/…`` only, so that a row stays as small
    as it is. ``nodes/gpu_idle_share`` is the part of all GPUs that is below
    ``IDLE_GPU_PERCENT``. Empty where nobody answered.

    Args:
        readings: of the nodes that answered, by the name of their series.
        alive: nodes that are part of the cluster.
    """
    if not readings:
        return {}
    row: dict[str, float] = {"nodes/alive": alive, "nodes/answered": len(readings)}
    by_key: dict[str, list[float]] = {}
    for name, reading in readings.items():
        for key, value in reading.values.items():
            by_key.setdefault(key, []).append(value)
            if alive <= MAX_SERIES_NODES:
                row[f"nodes/{name}/{key}"] = value
    for key, values in by_key.items():
        row[f"nodes/mean/{key}"] = round(statistics.fmean(values), 4)
        if alive > MAX_SERIES_NODES:
            row[f"nodes/min/{key}"] = min(values)
            row[f"nodes/max/{key}"] = max(values)
    gpus_percent = [one for reading in readings.values() for one in reading.gpus_percent]
    if gpus_percent:
        row["nodes/gpu_idle_share"] = round(_idle(gpus_percent) / len(gpus_percent), 4)
    return row


async def read_nodes(
    endpoints: Iterable[NodeEndpoint],
) -> tuple[dict[str, Reading], dict[str, str]]:
    """Ask every node's agent, a few at a time.

    Returns:
        What the nodes said that answered, and for the others the reason, by name.
    """
    readings: dict[str, Reading] = {}
    failed: dict[str, str] = {}
    places = asyncio.Semaphore(AT_ONCE)

    async def read(endpoint: NodeEndpoint) -> None:
        async with places:
            try:
                async with asyncio.timeout(NODE_TIMEOUT_S):
                    text = await _fetch(session, endpoint)
                readings[endpoint.name] = parse_metrics(text)
            except TimeoutError:
                failed[endpoint.name] = f"no answer within {NODE_TIMEOUT_S:g} s"
            except (aiohttp.ClientError, OSError, ValueError) as error:
                failed[endpoint.name] = f"{type(error).__name__}: {error}"[:200]

    # No proxy of the environment stands between the nodes of a cluster.
    async with aiohttp.ClientSession(trust_env=False) as session:
        await asyncio.gather(*(read(endpoint) for endpoint in endpoints))
    # A node whose agent has nothing to say of it yet is a gap, too.
    for name in [name for name, reading in readings.items() if not reading.values]:
        del readings[name]
        failed[name] = "its agent says nothing of it"
    return readings, failed


async def _fetch(session: aiohttp.ClientSession, endpoint: NodeEndpoint) -> str:
    """The wanted lines of an agent's answer.

    Raises:
        ValueError: the answer is longer than it may be.
    """
    if not endpoint.port:
        raise ValueError("its agent has no port for metrics")
    host = f"[{endpoint.ip}]" if ":" in endpoint.ip else endpoint.ip
    url = f"http://{host}:{endpoint.port}/metrics"
    kept: list[bytes] = []
    rest, read_bytes = b"", 0
    async with session.get(url, allow_redirects=False, raise_for_status=True) as answer:
        async for chunk in answer.content.iter_any():
            read_bytes += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            if read_bytes > MAX_ANSWER_BYTES or len(rest) > MAX_LINE_BYTES:
                raise ValueError(f"its answer is too long, over {read_bytes} bytes")
            kept += [line for line in lines if line.startswith(_WANTED)]
    kept += [rest] if rest.startswith(_WANTED) else []
    return b"\n".join([*kept, b""]).decode()
