"""Bring home what lies in journals: those of dead processes, and at a finish everybody's.

A journal whose lock is free belongs to a process that is gone: the normal end of a killed
worker. Its bytes are offered to the service, which takes what it does not have, and the
directory is removed. The journal of a living process is read from outside in the same way and
left in place; its own thread may send the same bytes, which changes nothing.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import msgspec
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raywb.blobs import deliver_blobs
from raywb.cluster import Cluster, connect
from raywb.connection import local_journals
from raywb.journal import FoundJournal, find_journals
from raywb.shipping import Endpoint, Sender, deliver_all

__all__ = ["SweepReport", "sweep_cluster", "sweep_node"]

_log = logging.getLogger(__name__)

#: Longest that a sweep waits for the ledger to be forced to the disk, in seconds.
DURABLE_WAIT_S = 3.0


class SweepReport(msgspec.Struct):
    """What a sweep found.

    Attributes:
        journals: journals that were seen.
        removed: those of dead processes that are home now.
        failed: journals that could not be brought home, with the reason.
        unreached: nodes that did not answer in time.
    """

    journals: int = 0
    removed: int = 0
    failed: dict[str, str] = {}
    unreached: list[str] = []

    def add(self, other: SweepReport) -> None:
        """Add another node's report."""
        self.journals += other.journals
        self.removed += other.removed
        self.failed |= other.failed
        self.unreached += other.unreached


def sweep_node(bases: list[Path], endpoint: Endpoint, deadline: float) -> SweepReport:
    """Bring home every journal on this node, until the monotonic time ``deadline``."""
    report = SweepReport()
    sender = Sender(endpoint, timeout_s=min(max(deadline - time.monotonic(), 1.0), 10.0))
    for base in bases:
        for journal in find_journals(base):
            report.journals += 1
            home = False
            try:
                if time.monotonic() > deadline:
                    raise TimeoutError("the time was over before its turn")
                home = _bring_home(sender, journal, deadline, report)
            except FileNotFoundError:
                pass  # its process ended in good order meanwhile, and left nothing behind
            except OSError as error:
                report.failed[journal.source_id] = str(error)
            finally:
                journal.release(delete=home)
                report.removed += home
    sender.close()
    return report


def _bring_home(
    sender: Sender, journal: FoundJournal, deadline: float, report: SweepReport
) -> bool:
    """Deliver one journal; True when it may be removed."""
    if not deliver_all(sender, journal.source_id, journal.segments, deadline):
        report.failed[journal.source_id] = "the time was over"
        return False
    if not deliver_blobs(sender, journal.directory, deadline):
        report.failed[journal.source_id] = "the time was over for the files of its artifacts"
        return False
    return journal.is_free and _is_durable(sender, journal)


def _is_durable(sender: Sender, journal: FoundJournal) -> bool:
    """Wait a moment for the ledger to be synced; until then the journal is the safer copy."""
    end = journal.segments.end()
    deadline = time.monotonic() + DURABLE_WAIT_S
    while sender.send(journal.source_id, 0, b"").durable < end:
        if time.monotonic() > deadline:
            return False  # it stays for the next sweep
        time.sleep(0.1)
    return True


def sweep_cluster(cluster: Cluster, endpoint: Endpoint, timeout_s: float) -> SweepReport:
    """Sweep this node in this process, and every other one with a task there.

    A task asks for no CPU, so it runs when all are taken. A node that does not answer in time
    is named in the report and costs the others nothing.
    """
    deadline = time.monotonic() + timeout_s
    pending: dict[Any, str] = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != cluster.node_id:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(_sweep_here).options(
                num_cpus=0, scheduling_strategy=strategy, max_retries=0
            )
            pending[task.remote(endpoint, timeout_s)] = node["NodeID"]
    report = sweep_node(local_journals(cluster), endpoint, deadline)
    for reference, node_id in pending.items():
        try:
            report.add(ray.get(reference, timeout=max(deadline - time.monotonic(), 0.1)))
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            report.unreached.append(node_id)
            _log.warning("raywb: node %s could not be swept: %s", node_id, error)
    return report


def _sweep_here(endpoint: Endpoint, timeout_s: float) -> SweepReport:
    return sweep_node(local_journals(connect()), endpoint, time.monotonic() + timeout_s)
