"""The nodes of the cluster: who is there, what each of them is, and how it is told to the run.

Ray's control store is looked at now and then, which no node notices; a node that is new gets one
probe, and nothing after that, so that it stays idle when its work is done. What is known lies in
``nodes.json``: a service that was restarted goes on with it, and probes nobody twice.

Calls of Ray may hang or raise: each is made in a thread of its own kind, one look and one probe
at a time, and what goes wrong is told in the status.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from raywb.nodes.records import NodeRecord, SeenNode, series_name
from raywb.nodes.utilization import NodeEndpoint
from raywb.reports import NodeStatus
from raywb.service.ray_calls import call_ray
from raywb.service.state import replace_file

__all__ = ["Facts", "Inventory", "NodeProbes", "Tell"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

FILE_NAME = "nodes.json"

#: Shortest pause between two looks at the cluster, in seconds, and how much longer than a look
#: the pause is: with thousands of nodes a look takes its time.
LOOK_INTERVAL_S = 5.0
LOOK_SHARE = 50.0

#: Longest that a probe may take, in seconds: a cold node has to start a worker first.
PROBE_TIMEOUT_S = 60.0

#: How often a node is probed that brings nothing, and the pauses before that, in seconds.
PROBE_ATTEMPTS = 3
PROBE_PAUSES_S = (60.0, 600.0)

#: Nodes that have left and are still known one by one; the oldest are forgotten first.
MOST_LEFT = 500

#: How long something Ray was asked for may take before the status says so, in seconds.
PATIENCE_S = 2 * PROBE_TIMEOUT_S


class Facts(Protocol):
    """What a probe brought; :class:`raywb.nodes.probe.ProbeResult`."""

    @property
    def facts(self) -> dict[str, Any] | None:
        """What :func:`raywb.nodes.node.collect_node_facts` found there."""

    @property
    def error(self) -> str | None:
        """Why there are none."""


Tell = Callable[[str, Facts], None]


@runtime_checkable
class NodeProbes(Protocol):
    """The way to the nodes of the cluster; with Ray it is :class:`raywb.sweep.RayNodes`."""

    def look(self) -> list[SeenNode]:
        """Every living node; may raise anything."""

    def probe(self, node_ids: Collection[str], timeout_s: float, tell: Tell) -> None:
        """Probe these nodes, and tell each one's result, in this thread; may raise anything."""


class _Kept(msgspec.Struct):
    """What lies in the file."""

    cluster_id: str
    nodes: dict[str, NodeRecord] = {}
    forgotten: int = 0
    axes: dict[int, float] = {}


class Inventory:
    """What is known of the nodes.

    Args:
        directory: the service's directory.
        cluster_id: what lies there of another cluster's nodes does not count.
        probes: the way to the nodes.
        clock: seconds since the epoch.

    Attributes:
        nodes: by node id, those that have left among them.
        version: grows with every change that a run is to be told.
        problem: what is wrong at present, in one sentence.
        probed: probes that were sent to nodes since the service's start.
    """

    def __init__(
        self,
        directory: Path,
        cluster_id: str,
        probes: NodeProbes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = directory / FILE_NAME
        self._probes = probes
        self._clock = clock
        self._cluster_id = cluster_id
        self._forgotten = 0
        self._axes: dict[int, float] = {}
        self._not_before: dict[str, float] = {}
        self._probing: asyncio.Task[None] | None = None
        self._saved: int | None = None
        self.nodes: dict[str, NodeRecord] = {}
        self.version = 0
        self.problem: str | None = None
        self.probed = 0
        self._load()

    # -- the file -------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            data = self._path.read_bytes()
            kept = _decode(data)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            # Nothing is lost that could not be had again, by one more probe of each node.
            _log.warning("raywb: %s cannot be used, nodes are probed again: %s", self._path, error)
            return
        if kept.cluster_id == self._cluster_id:
            self.nodes, self._forgotten = kept.nodes, kept.forgotten
            self._axes = kept.axes
            self._saved = self.version

    def _save(self) -> None:
        if self._saved == self.version:
            return
        body = msgspec.json.encode(_Kept(self._cluster_id, self.nodes, self._forgotten, self._axes))
        try:
            replace_file(self._path, _checksum(body) + b"\n" + body)
        except OSError as error:
            self.problem = f"what is known of the nodes cannot be written down: {error}"
            return
        self._saved = self.version

    # -- looking and probing --------------------------------------------------------------------

    async def serve(self) -> None:
        """Look, and probe who is new, for as long as the service lives."""
        try:
            await self._look_again_and_again()
        finally:
            if self._probing is not None:
                self._probing.cancel()

    async def _look_again_and_again(self) -> None:
        while True:
            began, look_s = time.monotonic(), 0.0
            try:
                seen = await self._ask("look", self._probes.look)
                look_s = time.monotonic() - began
            except Exception as error:  # noqa: BLE001 - whatever Ray raises, there is a next time
                self.problem = f"the cluster's nodes cannot be looked at: {error}"
                _log.warning("raywb: %s", self.problem)
            else:
                self.problem = None
                self.note(seen)
                self._begin_probe()
                self._save()
            await asyncio.sleep(max(LOOK_INTERVAL_S, LOOK_SHARE * look_s))

    def note(self, seen: Iterable[SeenNode]) -> None:
        """Take over who is there now; whoever is not has left."""
        now = self._clock()
        there = {node.node_id: node for node in seen}
        for node_id, record in self.nodes.items():
            if record.is_alive and node_id not in there:
                record.left_s = now
                self.version += 1
        taken = {record.name for record in self.nodes.values() if record.is_alive}
        for node_id, node in there.items():
            known = self.nodes.get(node_id)
            if known is None:
                name = series_name(node, taken)
                taken.add(name)
                self.nodes[node_id] = NodeRecord(name=name, seen=node, joined_s=now)
                self.version += 1
            elif not known.is_alive or known.seen != node:
                known.seen, known.left_s = node, None
                self.version += 1
        self._forget()

    def _forget(self) -> None:
        left = [node_id for node_id, record in self.nodes.items() if not record.is_alive]
        if len(left) > MOST_LEFT:
            left.sort(key=lambda node_id: self.nodes[node_id].left_s or 0.0)
            for node_id in left[:-MOST_LEFT]:
                del self.nodes[node_id]
                self._forgotten += 1

    def due(self) -> list[str]:
        """Nodes that are to be probed now."""
        now = time.monotonic()
        return [
            node_id
            for node_id, record in self.nodes.items()
            if record.is_alive
            and record.facts is None
            and record.attempts < PROBE_ATTEMPTS
            and self._not_before.get(node_id, 0.0) <= now
        ]

    @property
    def is_settled(self) -> bool:
        """Each node that is there has been probed, or it was tried."""
        alive = [record for record in self.nodes.values() if record.is_alive]
        return bool(alive) and all(one.facts is not None or one.error for one in alive)

    def _begin_probe(self) -> None:
        if (self._probing is None or self._probing.done()) and (node_ids := self.due()):
            self._probing = asyncio.get_running_loop().create_task(self._probe(node_ids))

    async def _probe(self, node_ids: list[str]) -> None:
        loop = asyncio.get_running_loop()
        for node_id in node_ids:
            record = self.nodes[node_id]
            pause_s = PROBE_PAUSES_S[min(record.attempts, len(PROBE_PAUSES_S) - 1)]
            self._not_before[node_id] = time.monotonic() + PROBE_TIMEOUT_S + pause_s
            record.attempts += 1
        self.probed += len(node_ids)

        def tell(node_id: str, result: Facts) -> None:
            loop.call_soon_threadsafe(self._note_result, node_id, result)

        probe = functools.partial(self._probes.probe, node_ids, PROBE_TIMEOUT_S, tell)
        try:
            await self._ask("probe", probe)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises, there is a next time
            text = f"the probe could not be sent: {error}"
            _log.warning("raywb: %s", text)
            for node_id in node_ids:
                if node_id in self.nodes and not self.nodes[node_id].facts:
                    self.nodes[node_id].error = text[:300]
        self.version += 1
        self._save()

    def _note_result(self, node_id: str, result: Facts) -> None:
        record = self.nodes.get(node_id)
        if record is None:
            return
        record.facts, record.error = result.facts, result.error
        if result.error:
            _log.warning("raywb: node %s: %s", record.name, result.error)
        self.version += 1

    async def _ask(self, name: str, call: Callable[[], _T]) -> _T:
        """Call Ray; the status says so while it does not answer."""

        def tell(waits_s: float) -> None:
            self.problem = f"Ray has not answered a {name} of the nodes for {waits_s:.0f} s"

        return await call_ray(name, call, PATIENCE_S, tell)

    # -- what others ask ------------------------------------------------------------------------

    @property
    def left(self) -> int:
        """Nodes that have left since the service was first started."""
        known = sum(not record.is_alive for record in self.nodes.values())
        return known + self._forgotten

    def axis_of(self, run: int, now_s: float) -> float:
        """When the nodes were first read for a run, in seconds since the epoch: now, or before."""
        if run not in self._axes:
            self._axes = {run: now_s}
            self._saved = None
            self._save()
        return self._axes[run]

    def endpoints(self) -> list[NodeEndpoint]:
        """Where the agents of the living nodes answer."""
        return [
            NodeEndpoint(record.name, record.seen.ip, record.seen.metrics_port)
            for record in self.nodes.values()
            if record.is_alive
        ]

    def statuses(self) -> list[NodeStatus]:
        """Each node as the status shows it: those that are there first."""
        ordered = sorted(self.nodes.values(), key=lambda one: (not one.is_alive, one.name))
        return [
            NodeStatus(
                name=record.name,
                node_id=record.seen.node_id,
                ip=record.seen.ip,
                is_head=record.seen.is_head,
                joined_s=record.joined_s,
                left_s=record.left_s,
                cpu_count=record.cpu_count,
                memory_gb=record.memory_gb,
                gpus=dict(record.gpu_types),
                probed=record.facts is not None,
                error=record.error,
                # Each GPU by itself would be most of it; they are counted above.
                facts={key: fact for key, fact in (record.facts or {}).items() if key != "gpus"},
                resources=record.seen.resources,
                labels=record.seen.labels,
            )
            for record in ordered
        ]


def _decode(data: bytes) -> _Kept:
    checksum, _, body = data.partition(b"\n")
    if checksum != _checksum(body):
        raise msgspec.DecodeError("its checksum is another one")
    return msgspec.json.decode(body, type=_Kept)


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)
