"""What all clients of one process share: its journal, its shipping thread, its channels.

One process is one source. Every ``attach()`` opens a numbered channel in the same journal. A
forked child is a new process: it leaves the inherited files alone, and gets a journal of its own
when it logs.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from raywb import __version__
from raywb.blobs import BlobLane
from raywb.channels import Channels
from raywb.cluster import Cluster
from raywb.device_values import forget_devices
from raywb.errors import ArtifactError
from raywb.frozen import Frozen
from raywb.journal import Journal, new_source_id
from raywb.orphans import Neighbours
from raywb.owner import ExitCode, await_end_of_run
from raywb.reports import RunInfo
from raywb.rows import (
    MAX_MESSAGE_BYTES,
    Artifact,
    ArtifactFile,
    Channel,
    Counters,
    End,
    EndChannel,
    Hello,
    Message,
    Owner,
    encode,
)
from raywb.rows_aside import RowsAside
from raywb.settings import journal_base
from raywb.shipping import Endpoint, Shipper

__all__ = ["EXIT_FLUSH_S", "Connection"]

_log = logging.getLogger(__name__)

#: Time between two tries to make a journal where none can be made, in seconds.
JOURNAL_RETRY_S = 1.0

#: Most bytes of config, definitions and the like that wait in memory for room on the disk.
UNSAID_BYTES = MAX_MESSAGE_BYTES

#: Longest that the end of a process waits for its last rows to be taken, in seconds. What is
#: not taken in this time stays on disk, and is brought home by a sweep.
EXIT_FLUSH_S = 2.0

#: The same for the driver that owns the run, while files of artifacts are under way.
OWNER_FLUSH_S = 60.0


class Connection:
    """This process as a source of one cluster's service.

    Args:
        cluster: the cluster.
        endpoint: where its service listens; None while nobody knows.
        epoch: number of its run.
        source_id: what the process announced itself as, if it did.

    Attributes:
        source_id: under which the process writes, or will as soon as it has a journal.
        append: takes an encoded message; False when it had to be counted as lost.
        lost: what could not be kept, by reason.
        aside: of the clients that have rows waiting for a device, these rows.
    """

    append: Callable[..., bool]

    def __init__(
        self,
        cluster: Cluster,
        endpoint: Endpoint | None,
        epoch: int,
        source_id: str | None = None,
    ) -> None:
        self.cluster = cluster
        self.source_id = source_id or new_source_id()
        self._endpoint = endpoint
        self._epoch = epoch
        self._channels = Channels()
        #: Messages that are no rows, and wait for room on the disk; rows come after them.
        self._unsaid: list[bytes] = []
        self._counters: dict[str, int] = {}
        self.aside: set[RowsAside] = set()
        self._written: tuple[int, dict[str, int]] = (0, {})
        self._lock = threading.RLock()
        self._next_try = 0.0
        self.rejected = 0
        self._owned: RunInfo | None = None
        self._exit_code: ExitCode | None = None
        self.journal: Journal | None = None
        self.shipper: Shipper | None = None
        self._frozen: Frozen | None = None
        self._open()

    def _open(self) -> None:
        """Make the journal and start the thread; without a journal rows are counted as lost."""
        try:
            self.journal = self._make_journal()
        except OSError as error:
            if self._next_try == 0.0:
                _log.warning("raywb: no journal can be made, rows are lost until it can: %s", error)
            self._next_try = time.monotonic() + JOURNAL_RETRY_S
            self.source_id = new_source_id()  # a directory of the old name may be half made
            self.journal = None
            self.append = self._append_without_journal
            return
        self.append = self.journal.append
        waiting, self._unsaid = self._unsaid, []
        self._say(
            Hello(
                source_id=self.journal.source_id,
                cluster_id=self.cluster.cluster_id,
                node_id=self.cluster.node_id,
                run_epoch=self._epoch,
                pid=os.getpid(),
                hostname=socket.gethostname(),
                started_at=time.time(),
                version=__version__,
                job_id=self.cluster.job_id,
                is_worker=self.cluster.is_worker,
            )
        )
        for channel in self._channels:
            self._say(channel)
        for payload in waiting:
            self._append_update(payload)
        self._frozen = Frozen(self.journal.directory)
        blobs = BlobLane(self._frozen, self.count_loss)
        neighbours = Neighbours(self.cluster.journal_bases())
        self.shipper = Shipper(
            self.journal, self._endpoint, self._write_counters, blobs, neighbours.step
        )
        try:
            self.shipper.start()
        except RuntimeError as error:
            # The interpreter is about to end, or the thread limit is reached: a sweep ships.
            _log.warning("raywb: no thread can be started, rows wait on disk: %s", error)

    def _make_journal(self) -> Journal:
        base = journal_base(self.cluster.session_dir, self.cluster.cluster_id)
        try:
            return Journal(base, self.source_id)
        except OSError:
            # A session directory that is full or not ours need not be the end of it.
            elsewhere = journal_base(None, self.cluster.cluster_id)
            if elsewhere == base:
                raise
            return Journal(elsewhere, self.source_id)

    def _append_without_journal(self, payload: bytes, *, counted: bool = True) -> bool:
        """Try again to make a journal, once a second; rows meanwhile are counted."""
        with self._lock:
            due = time.monotonic() >= self._next_try
            if due and self.append == self._append_without_journal:
                self._open()
            if self.journal is not None:
                return self.append(payload, counted=counted)
        if counted:
            self.count_loss("no_journal")
        return False

    def _append_behind_unsaid(self, payload: bytes, *, counted: bool = True) -> bool:
        """First what waits, then this: a row before its channel would get the wrong name."""
        with self._lock:
            journal = self.journal
            if self._say_unsaid() or journal is None:
                return self.append(payload, counted=counted)
        if counted:
            journal.count_loss(journal.last_reason)
        return False

    def _say_unsaid(self) -> bool:
        """Append what waits for room; True when nothing waits any more."""
        with self._lock:
            if self.journal is None:
                return not self._unsaid
            while self._unsaid:
                # Taken out first: a signal handler that logs may come here too.
                payload = self._unsaid.pop(0)
                if not self.journal.append(payload, counted=False):
                    self._unsaid.insert(0, payload)
                    return False
            self.append = self.journal.append
            return True

    def _append_update(self, payload: bytes) -> bool:
        """Append a message that is no row, now or as soon as there is room."""
        with self._lock:
            if self.append(payload, counted=False):
                return True
            if sum(map(len, self._unsaid)) + len(payload) > UNSAID_BYTES:
                self.count_loss("updates")
                return False
            self._unsaid.append(payload)
            if self.journal is not None:
                self.append = self._append_behind_unsaid
            return True

    def _say(self, message: Message) -> bool:
        return self._append_update(encode(message))

    def say(self, message: Message) -> bool:
        """Append a message that is no row; one that is too large is refused and counted."""
        payload = encode(message)
        if len(payload) > MAX_MESSAGE_BYTES:
            self.rejected += 1
            _log.warning(
                "raywb: a %s of %d bytes is refused: %d are most",
                type(message).__name__,
                len(payload),
                MAX_MESSAGE_BYTES,
            )
            return False
        return self._append_update(payload)

    def log_artifact(self, message: Artifact, found: list[tuple[str, Path]]) -> bool:
        """Freeze the files, and append the message with what they were found to be.

        Returns:
            False when the artifact cannot be kept here; it is counted as lost.

        Raises:
            ArtifactError: a file cannot be read, or there are too many.
        """
        with self._lock:
            if self._frozen is None and time.monotonic() >= self._next_try:
                self._open()
            journal, frozen, shipper = self.journal, self._frozen, self.shipper
        if journal is None or frozen is None or shipper is None:
            self.count_loss("artifact_no_journal")
            return False
        unfrozen = [ArtifactFile(name, "0" * 64, 2**63) for name, _ in found]
        if len(encode(msgspec.structs.replace(message, files=unfrozen))) > MAX_MESSAGE_BYTES:
            raise ArtifactError(f"cannot log artifact {message.name!r}: too many files; pack them")
        try:
            files = frozen.take(found)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.count_loss("artifact_disk_full" if full else "artifact_error")
            _log.warning("raywb: artifact %r cannot be kept on this node: %s", message.name, error)
            return False
        # Unlike other updates it does not wait for room: its files must not come before it.
        payload = encode(msgspec.structs.replace(message, files=files))
        if not self.append(payload, counted=False):
            for file in files:
                frozen.release(file.digest)
            self.count_loss("artifact_error")
            return False
        shipper.blobs.add(files, journal.end)
        shipper.wake()
        return True

    def open_channel(
        self,
        stage: str | None,
        rank: int | None,
        world_size: int | None,
        *,
        label: str | None = None,
        axis: str | None = None,
        own_run: tuple[int, int] | None = None,
    ) -> int:
        """Open a channel for a stage; returns its number, see :class:`raywb.channels.Channels`.

        ``own_run`` is the number and the session of the stage's own run; for the rest see
        :class:`raywb.rows.Channel`.
        """
        run, session = own_run or (0, 0)
        with self._lock:
            opened = self._channels.open(
                Channel(0, stage, rank, world_size, label, axis, run, session)
            )
            if run:
                self._exit_code = self._exit_code or ExitCode()
            # A new journal begins with all channels.
            if opened.is_back or (opened.is_new and self.journal is not None):
                self._say(opened.channel)
            return opened.channel.channel

    def rank_of(self, channel: int) -> int | None:
        """The rank with which a channel was opened."""
        return self._channels[channel].rank

    def is_own_run(self, channel: int) -> bool:
        """Whether a channel leads to a stage's own run."""
        return self._channels[channel].run != 0

    def end_channel(self, channel: int, exit_code: int) -> None:
        """A client was closed: nothing more comes by its channel, or nothing for now."""
        with self._lock:
            if self._channels.leave(channel):
                self._say(EndChannel(channel, exit_code))

    def use(self, endpoint: Endpoint | None, epoch: int) -> None:
        """Take over an address that was looked up anew."""
        if endpoint is not None:
            self._endpoint = endpoint
            self._epoch = epoch
            if self.shipper is not None:
                self.shipper.use(endpoint)

    def own(self, run: RunInfo) -> None:
        """This process opened the run: how it ends says something of the run.

        The service is to know before anything can happen to this process, so it is waited for a
        moment.
        """
        if self.journal is not None:
            self._owned = run
            self._exit_code = self._exit_code or ExitCode()
            ends_cluster = self.cluster.started_here
            self._say(Owner(run.epoch, str(self.journal.directory), ends_cluster))
            self.flush(EXIT_FLUSH_S)

    def disown(self) -> None:
        """The run was finished, or was tried to: this process's end is its own again."""
        self._owned = None
        if self._exit_code is not None and not self._channels.open_own_runs:
            self._exit_code.remove()
            self._exit_code = None

    def count_loss(self, reason: str) -> None:
        """Count a row that could not even be appended."""
        with self._lock:
            if self.journal is not None:
                self.journal.count_loss(reason)
            else:
                self._counters[reason] = self._counters.get(reason, 0) + 1

    @property
    def lost(self) -> dict[str, int]:
        """Rows of this process that could not be kept, by reason."""
        # Copies: other threads count while this one adds up.
        total = dict(self._counters)
        for reason, count in dict(self.journal.lost if self.journal else {}).items():
            total[reason] = total.get(reason, 0) + count
        return total

    def _write_counters(self) -> None:
        """Tell the service the totals when they changed; called by the shipping thread."""
        self._say_unsaid()
        totals = (self.rejected, self.lost)
        if totals != self._written and self.append(encode(Counters(*totals)), counted=False):
            self._written = totals

    def flush(self, timeout_s: float) -> bool:
        """Wait until the service has everything; False when it has not in time."""
        deadline = time.monotonic() + timeout_s
        settled = self._settle(timeout_s)
        if self.shipper is None:
            return False
        self._write_counters()
        return self.shipper.flush(max(deadline - time.monotonic(), 0.0)) and settled

    def _settle(self, timeout_s: float, *, give_up: bool = False) -> bool:
        """Wait for the rows that wait for a device; False when there are some left."""
        deadline = time.monotonic() + timeout_s
        return all(
            [
                rows.settle(max(deadline - time.monotonic(), 0.0), give_up=give_up)
                for rows in list(self.aside)
            ]
        )

    def close(self, timeout_s: float) -> None:
        """End this source in good order: say so, flush, and let go of the files.

        Files that hold what the service does not have stay for a sweep.
        """
        self._settle(timeout_s, give_up=True)
        for channel in self._channels.open_own_runs:
            self.end_channel(channel, 0)
        self.disown()
        if self.journal is None or self.shipper is None:
            return
        self._write_counters()
        self._end(timeout_s)
        self.shipper.stop()
        self.journal.close(keep=bool(self._unsaid) or self._written[1] != self.lost)

    def _end(self, timeout_s: float, failed: bool | None = None) -> None:
        """Say that this source has ended, and flush.

        A source whose artifacts are not home has not: a sweep must come for them. But the run's
        owner says in any case how it ends, or it would count as killed.
        """
        if self.shipper is None:
            return
        late = self.shipper.blobs.left and not self.shipper.flush(timeout_s)
        if late and failed is None:
            return
        self._say(End(time.time(), failed=failed))
        self.flush(min(timeout_s, EXIT_FLUSH_S) if late else timeout_s)

    def at_exit(self) -> None:
        """The process ends: say so, and flush for a moment.

        A driver that owns the run says how it ends; if the cluster goes with it, it waits until
        W&B has closed the run, as W&B's own client would at this moment.

        The journal stays open, since an exit handler that comes after this one may still log;
        such rows are brought home by a sweep.
        """
        if self.journal is None:
            return  # nothing was ever logged here: a forked child that only inherited the client
        self._settle(EXIT_FLUSH_S, give_up=True)
        self._write_counters()
        failed = self._exit_code.failed if self._exit_code is not None else None
        for channel in self._channels.open_own_runs:
            self.end_channel(channel, int(bool(failed)))
        failed = failed if self._owned is not None else None
        waits = failed is not None and self.shipper is not None and self.shipper.blobs.left
        self._end(OWNER_FLUSH_S if waits else EXIT_FLUSH_S, failed)
        if self._owned is not None and self.cluster.started_here and self._endpoint is not None:
            await_end_of_run(self._endpoint, self.journal.source_id, self._owned)

    def after_fork_in_child(self) -> None:
        """Leave the parent's files alone; the child's first row makes its own journal."""
        self._lock = threading.RLock()
        if self.journal is not None:
            self.journal.abandon_in_child()
        self.journal = None
        self.shipper = None
        self._frozen = None
        for rows in list(self.aside):
            rows.abandon_in_child()
        forget_devices()
        self.aside.clear()  # the same set: every client of the child goes on with it
        self.source_id = new_source_id()
        self._channels.inherit()
        self.disown()
        self.rejected = 0
        self._unsaid = []
        self._counters = {}
        self._written = (0, {})
        self._next_try = 0.0
        self.append = self._append_without_journal
