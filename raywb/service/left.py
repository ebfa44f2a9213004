"""A service's directory after its cluster is gone: opened, locked, and journals taken in.

Nothing here needs Ray. The same parts work as in the service, on a loop of their own: ledger,
merge, outbox and the sinks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from raywb.errors import DirectoryError, DirectoryInUse, FrameError
from raywb.found_journals import FoundJournal, find_journals
from raywb.frozen import blobs_in
from raywb.journal import SEGMENT_BYTES
from raywb.reports import FinishReport
from raywb.rows import End, Frame, Hello, decode, encode, frame, scan
from raywb.service.blobs import BlobStore
from raywb.service.delivery import Delivery
from raywb.service.runs import Runs
from raywb.service.sink_process import SinkProcess
from raywb.service.state import RunState, load_left_state, lock_directory

__all__ = [
    "Homecoming",
    "LeftDirectory",
    "Step",
    "Tell",
    "load_left_state",
    "take_in",
    "watch_sink",
]

_log = logging.getLogger(__name__)

#: Bytes that are read from a journal at a time.
BATCH_BYTES = 4 * 1024 * 1024

#: Time between two looks at how far the sinks are, in seconds.
LOOK_S = 0.1


class Step(NamedTuple):
    """How far the work is: what is being done, how much of it is done, and what is in the way."""

    text: str
    done: int = 0
    total: int = 0
    trouble: str | None = None


#: Is told each step; it may be told the same one often.
Tell = Callable[[Step], None]


class LeftDirectory:
    """The directory of a service that is gone, and its parts at work again.

    Args:
        directory: what ``raywb status`` calls files, and a run's ``dir``.

    Raises:
        DirectoryInUse: a service works in it.
        DirectoryError: it is not a service's, or what lies in it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = load_left_state(directory)
        try:
            self._lock_fd = lock_directory(directory)
        except BlockingIOError as error:
            raise DirectoryInUse(
                f"a raywb service works in {directory}: it delivers by itself as long as its "
                "cluster lives, and `raywb finish` ends its run"
            ) from error
        except OSError as error:
            raise DirectoryError(f"{directory} cannot be worked in: {error}") from error
        try:
            # Read again: the service may have written it until its end.
            self.state = load_left_state(directory)
            stage_runs = [run.number for run in self.state.stage_runs]
            self.delivery = Delivery(directory, stage_runs)
        except BaseException as error:
            os.close(self._lock_fd)
            if isinstance(error, (OSError, msgspec.MsgspecError)):
                raise DirectoryError(f"what lies in {directory} cannot be read: {error}") from error
            raise
        self._tasks: set[asyncio.Task[None]] = set()
        self.runs = Runs(directory, self.state, self.delivery, self._spawn, None)

    def _spawn(self, name: str, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(part(), name=name))

    async def deliver(
        self, runs: list[RunState], deadline: float, tell: Tell
    ) -> list[FinishReport]:
        """Wait until W&B has these runs, which have a sink each, or it is ``deadline``."""
        reports = []
        for run in runs:
            sink = self.runs.sink_of(run)
            if sink is not None:
                await watch_sink(sink, f"Delivering {run.info.name}", deadline, tell)
            reports.append(self.runs.report(run, closed=sink is None or sink.done.is_set()))
        return reports

    async def close(self) -> None:
        """End the sinks and leave the directory to whoever comes next."""
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                _log.error("raywb: a run could not be brought to its end", exc_info=result)
        self.delivery.close()
        os.close(self._lock_fd)


async def watch_sink(sink: SinkProcess, text: str, deadline: float, tell: Tell) -> None:
    """Tell how far a sink is until it is done, or it is ``deadline``."""
    while True:
        status = sink.status
        trouble = status.last_error if status.state == "retrying" else None
        tell(Step(text, sink.delivered_rows, sink.emitted_rows, trouble))
        if sink.done.is_set() or time.monotonic() > deadline:
            return
        await asyncio.sleep(LOOK_S)


class Homecoming:
    """Takes journals on this machine, and the files beside them, into a service's directory.

    Attributes:
        journals: how many of this cluster were found.
        foreign: how many of other clusters were passed over.
        failed: those that could not be taken in, with the reason.
    """

    def __init__(self, delivery: Delivery, cluster_id: str) -> None:
        self._delivery = delivery
        self._ledger = delivery.ledger
        self._cluster_id = cluster_id
        self.journals = 0
        self.foreign = 0
        self.failed: dict[str, str] = {}

    def sweep(self, base: Path, *, remove: bool) -> Iterator[str]:
        """Take in the journals under ``base``; yields its source behind each step.

        Args:
            base: a directory that holds journals.
            remove: delete those of dead processes that are home, as a service's sweep does.
        """
        try:
            for journal in find_journals(base):
                for _ in self._bring_home(journal, remove=remove):
                    yield journal.source_id
                yield journal.source_id
        except OSError as error:
            self.failed[str(base)] = str(error)

    def _bring_home(self, journal: FoundJournal, *, remove: bool) -> Iterator[None]:
        home = False
        try:
            cluster_id = self._cluster_of(journal)
            # Where none can be read, its place decides: ours is known, a copy's is not.
            if cluster_id != self._cluster_id and not (cluster_id is None and remove):
                self.foreign += 1
                return
            self.journals += 1
            yield from take_in(self._delivery, journal)
            self._ledger.sync()
            home = journal.is_free
        except FileNotFoundError:
            pass  # its process ended in good order meanwhile, and left nothing behind
        except OSError as error:
            self.failed[journal.source_id] = str(error)
        finally:
            journal.release(delete=home and remove)

    def _cluster_of(self, journal: FoundJournal) -> str | None:
        """The cluster that a journal belongs to: its first frame says, unless the ledger knows."""
        if self._ledger.end_of(journal.source_id):
            return self._cluster_id
        _, data = journal.segments.read(0, 1)
        for found in scan(data):
            try:
                message = decode(found.payload) if isinstance(found, Frame) else None
            except FrameError:
                return None
            return message.cluster_id if isinstance(message, Hello) else None
        return None


def take_in(delivery: Delivery, journal: FoundJournal) -> Iterator[None]:
    """Append to the ledger what it does not have of a journal, and the end of a killed process.

    The frozen files of a dead process's artifacts come before the end: without them it has not
    ended. They come in pieces: yields where a service may do something else.

    Raises:
        OSError: the journal cannot be read, or the directory takes nothing.
    """
    ledger = delivery.ledger
    source_id = journal.source_id
    target = journal.segments.end()
    if ledger.end_of(source_id) > target:
        yield from _take_in_blobs(delivery.blobs, journal)
        return  # its end was written in its place before
    last = b""
    while True:
        offset = ledger.end_of(source_id)
        begin, data = journal.segments.read(offset, BATCH_BYTES, final=journal.is_free)
        if not data:
            break
        ledger.append(source_id, begin, data, after_gap=begin > offset)
        last = data
    if not journal.is_free:
        return
    if not last:  # nothing new: its last segment tells how it ended
        last = journal.segments.read(journal.segments.starts()[-1], SEGMENT_BYTES * 2)[1]
    yield from _take_in_blobs(delivery.blobs, journal)
    # Its process may have ended while its disk was full. Totals may be told twice.
    end = journal.losses()
    ended = _ends_with_end(last)
    if end or not ended:
        # The end stays the last thing in the ledger, or its source would seem to go on.
        end += frame(encode(End(time.time(), killed=not ended)))
    if end:
        ledger.append(source_id, ledger.end_of(source_id), end)


def _take_in_blobs(blobs: BlobStore, journal: FoundJournal) -> Iterator[None]:
    for digest in blobs_in(journal.directory):
        try:
            yield from blobs.take_in(journal.directory / "blobs" / digest)
        except FrameError as error:
            # Damaged on disk, so it cannot come; the run's report names its artifact.
            _log.warning("raywb: a file of an artifact is left out: %s", error)


def _ends_with_end(data: bytes) -> bool:
    ended = False
    for found in scan(data):
        try:
            message = decode(found.payload) if isinstance(found, Frame) else None
        except FrameError:
            message = None
        ended = isinstance(message, End)
    return ended
