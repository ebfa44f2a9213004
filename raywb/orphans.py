"""Bring home what lies in journals: those of dead processes, and at a finish everybody's.

A journal whose lock is free belongs to a process that is gone: the normal end of a killed
worker. Its bytes are offered to the service, which takes what it does not have, and then the
frozen files beside them; an end is written
in the dead process's place, and the directory is removed. The journal of a living process is
read from outside in the same way and left as it is; its own thread may send the same bytes, which
changes nothing.

Nothing here calls Ray: a living client's shipping thread does this for its neighbours, and
``raywb.sweep`` takes it to nodes that have none.
"""

from __future__ import annotations

import random
import time
from collections.abc import Container, Iterator
from pathlib import Path

from raywb.blobs import bring_blobs_home
from raywb.found_journals import FoundJournal, find_journals, sole_sweeper
from raywb.reports import SweepReport
from raywb.rows import End, encode, frame
from raywb.shipping import BATCH_BYTES, Answer, Endpoint, Sender

__all__ = ["Neighbours", "sweep_node"]

#: Longest that a sweep waits for the ledger to be forced to the disk, in seconds.
DURABLE_WAIT_S = 3.0

#: How often the journals of a machine are looked at by one of its processes, in seconds.
LOOK_INTERVAL_S = 5.0

#: Longest time between two looks after failures, in seconds.
LONGEST_LOOK_INTERVAL_S = 60.0

#: Most bytes in a request for a neighbour: a process's own rows are not to wait for more.
NEIGHBOUR_BATCH_BYTES = 256 * 1024


def bring_home(
    sender: Sender, journal: FoundJournal, batch_bytes: int = BATCH_BYTES
) -> Iterator[Answer]:
    """Offer a journal to the service, one request at a time; yields each answer.

    A living process may append faster than its journal is read here, so what it logs after the
    call began is not waited for. Of a dead one everything is sent: what is torn or damaged at
    its end is for the service to count.

    Raises:
        OSError: the journal cannot be read, or the service does not take it.
    """
    source_id, segments = journal.source_id, journal.segments
    target = segments.end()
    answer = sender.send(source_id, 0, b"")
    yield answer
    while answer.end < target and not answer.home:
        delivered = sender.deliver(
            source_id, segments, answer.end, batch_bytes=batch_bytes, final=journal.is_free
        )
        answer = delivered.answer
        yield answer
        if delivered.length == 0:
            break
    # Before the end: a source whose files are not home has not ended.
    for _ in bring_blobs_home(sender, journal.directory):
        yield answer
    # What lies behind the journal's own end was written in its place by an earlier visit.
    if journal.is_free and not answer.home and answer.end <= target:
        # Its process may have ended while its disk was full. Totals may be told twice.
        last = journal.losses()
        if last or not answer.ended:
            # The end stays the last thing in the ledger, or its source would seem to go on.
            last += frame(encode(End(time.time(), killed=not answer.ended)))
        if last:
            yield sender.send(source_id, answer.end, last)


def sweep_node(bases: list[Path], endpoint: Endpoint, deadline: float) -> SweepReport:
    """Bring home every journal on this node, until the monotonic time ``deadline``."""
    report = SweepReport()
    sender = Sender(endpoint, timeout_s=min(max(deadline - time.monotonic(), 1.0), 10.0))
    waiting = _visit(bases, sender, deadline, report)
    # What the ledger has not forced to its disk yet stays here a moment longer, as the safer copy.
    patience = min(deadline, time.monotonic() + DURABLE_WAIT_S)
    while waiting and time.monotonic() < patience:
        time.sleep(0.1)
        again = SweepReport()
        waiting = _visit(bases, sender, deadline, again, waiting)
        report.removed += again.removed
        report.failed |= again.failed
    sender.close()
    return report


def _visit(
    bases: list[Path],
    sender: Sender,
    deadline: float,
    report: SweepReport,
    source_ids: Container[str] | None = None,
) -> set[str]:
    """Visit each journal once; returns the dead ones that are home, but must stay for now."""
    waiting = set()
    for base in bases:
        for journal in find_journals(base, source_ids):
            report.journals += 1
            durable = False
            try:
                for answer in bring_home(sender, journal):
                    durable = journal.is_free and answer.durable >= answer.end
                    if time.monotonic() > deadline:
                        raise TimeoutError("the time was over")
                if not journal.is_free:
                    report.alive.append(journal.source_id)
                elif not durable:
                    waiting.add(journal.source_id)
            except FileNotFoundError:
                durable = False  # its process ended in good order meanwhile, and left nothing
            except OSError as error:
                durable = False
                report.failed[journal.source_id] = str(error)[:200]
            finally:
                journal.release(delete=durable)
                report.removed += durable
    return waiting


class Neighbours:
    """The journals of dead processes beside ours, brought home a request at a time.

    Of all processes of a machine one at a time looks around, every few seconds.

    Args:
        bases: directories on this machine where processes of this cluster keep their journals.
    """

    def __init__(self, bases: list[Path]) -> None:
        self._bases = bases
        self._interval_s = LOOK_INTERVAL_S
        self._next_look = time.monotonic() + random.uniform(0.2, 1.0) * LOOK_INTERVAL_S
        self._look: Iterator[Answer] | None = None
        #: Journals that could not be brought home the last time; the others come first.
        self._failed: set[str] = set()

    def step(self, sender: Sender) -> bool:
        """Make one request at most; True when there is more to do now.

        Raises:
            OSError: a journal could not be brought home; it is tried again later.
        """
        if self._look is None:
            if time.monotonic() < self._next_look:
                return False
            self._look = self._look_around(sender)
        try:
            if next(self._look, None) is not None:
                return True
        except OSError:
            self._rest(min(self._interval_s * 2, LONGEST_LOOK_INTERVAL_S))
            raise
        self._failed.clear()
        self._rest(LOOK_INTERVAL_S)
        return False

    def _rest(self, interval_s: float) -> None:
        self._look = None
        self._interval_s = interval_s
        self._next_look = time.monotonic() + random.uniform(0.5, 1.5) * interval_s

    def _look_around(self, sender: Sender) -> Iterator[Answer]:
        for base in self._bases:
            with sole_sweeper(base, LOOK_INTERVAL_S) as ours:
                if ours:
                    yield from self._bring_home_from(base, sender)

    def _bring_home_from(self, base: Path, sender: Sender) -> Iterator[Answer]:
        for journal in find_journals(base):
            durable = False
            try:
                if journal.is_free and journal.source_id not in self._failed:
                    for answer in bring_home(sender, journal, NEIGHBOUR_BATCH_BYTES):
                        durable = False
                        yield answer
                        durable = answer.durable >= answer.end
            except OSError:
                durable = False
                self._failed.add(journal.source_id)
                raise
            finally:
                # What the ledger has not forced to its disk yet is removed at a later look.
                journal.release(delete=durable)
