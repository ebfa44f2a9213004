"""What the service tells about itself: the run, its state, and how it ended.

These structs cross process boundaries and reach the user, so they are frozen and hold plain
values; none of them ever holds a key or a token.
"""

from __future__ import annotations

from typing import Any

import msgspec

from raywb.live import Live

__all__ = [
    "FinishReport",
    "NodeStatus",
    "PageAddress",
    "RankStatus",
    "RecoveryReport",
    "RunInfo",
    "SinkStatus",
    "SourceStatus",
    "StageRunRequest",
    "StageRunStatus",
    "StageStatus",
    "Status",
    "SweepReport",
    "SyncReport",
    "SyncedRun",
    "UnconfirmedSource",
]


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The W&B run that this cluster's updates go to.

    Attributes:
        mode: ``online``, ``offline`` or ``disabled``.
        url: the run's page, once W&B has named one.
        dir: directory of the ledger, the outbox and W&B's own files on the head node.
        group_source: where the group's name came from, as a person would say it.
        epoch: counts the runs of one service, from 1.
        provisional: True while no ``start()`` has brought settings.
        began_offline: it was offline for want of a key, and went online when one came; the
            files of that time lie in ``<dir>/superseded`` and need not be uploaded.
    """

    project: str
    id: str
    name: str
    mode: str
    dir: str
    entity: str | None = None
    group: str | None = None
    group_source: str | None = None
    job_type: str | None = None
    url: str | None = None
    epoch: int = 1
    provisional: bool = False
    began_offline: bool = False


class SourceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process that logs: who it is, and how far its journal has come.

    Attributes:
        heard_ago_s: seconds since its last request; None when it has not been heard since the
            service was started again, or has ended.
        ended: it is over, and all that it logged is here.
        killed: it ended without saying so; its journal was brought home.
    """

    source_id: str
    hostname: str
    node_id: str
    pid: int
    stages: list[str]
    received_bytes: int
    received_rows: int
    heard_ago_s: float | None
    ended: bool
    killed: bool = False


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the cluster.

    Attributes:
        name: its hostname, told from that of other nodes; so its series are called, too.
        joined_s, left_s: when it was first seen, and first seen to be gone, in seconds since the
            epoch.
        cpu_count, memory_gb: what its machine or its container has; until it is probed, what Ray
            hands out.
        gpus: how many of which model.
        probed: what it is has been asked on the node itself.
        error: why its last probe brought nothing.
        facts: what else the probe brought: versions, container, cloud, disk, drivers.
        resources, labels: Ray's own.
    """

    name: str
    node_id: str
    ip: str
    is_head: bool
    joined_s: float
    left_s: float | None
    cpu_count: float
    memory_gb: float
    gpus: dict[str, int]
    probed: bool
    error: str | None
    facts: dict[str, Any]
    resources: dict[str, float]
    labels: dict[str, str]


class UnconfirmedSource(msgspec.Struct, frozen=True, kw_only=True):
    """One process that fell silent, and whose journal cannot be had: its node may be lost.

    Attributes:
        hostname, pid: empty and 0 when nothing of it ever arrived.
        acknowledged_bytes: what had been taken from its journal: the offset after the last row
            that is safe.
        received_rows: rows in those bytes.
        unacknowledged_rows: rows that it had in its journal when it was last heard, and that
            never arrived; None when nobody knows.
        quiet: when it was last heard, all that it had was here, and it had logged nothing for a
            while: most likely nothing is missing.
        reason: why its journal cannot be had.
    """

    source_id: str
    node_id: str
    hostname: str = ""
    pid: int = 0
    acknowledged_bytes: int = 0
    received_rows: int = 0
    unacknowledged_rows: int | None = None
    quiet: bool = False
    reason: str = ""


class SweepReport(msgspec.Struct):
    """What a sweep of journals found.

    Attributes:
        journals: journals that were seen.
        removed: those of dead processes that are home now.
        alive: sources whose process holds its journal; what it had in there was read.
        failed: journals that could not be brought home, with the reason.
        unreached: nodes that did not answer in time.
        gone: nodes that were to be swept, and are no longer part of the cluster.
    """

    journals: int = 0
    removed: int = 0
    alive: list[str] = []
    failed: dict[str, str] = {}
    unreached: list[str] = []
    gone: list[str] = []

    def add(self, other: SweepReport) -> None:
        """Add another node's report."""
        self.journals += other.journals
        self.removed += other.removed
        self.alive += other.alive
        self.failed |= other.failed
        self.unreached += other.unreached
        self.gone += other.gone


class SinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How W&B's side keeps up.

    Attributes:
        state: ``waiting`` (no run yet), ``opening``, ``running``, ``retrying``, ``no key``,
            ``resting`` (left, since nobody has the run any more), ``finished``, ``disabled``.
        applied_rows: rows that W&B's client has taken.
        confirmed_rows: rows that W&B has shown to have: online its server, asked at intervals;
            offline its files, read when the run is opened and when it is ended.
        restarts: how often the child process had to be started again.
        last_error: what went wrong last, in one sentence.
    """

    state: str
    applied_rows: int
    restarts: int
    confirmed_rows: int = 0
    last_error: str | None = None


class StageRunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for that wants a run of its own for its stage.

    Attributes:
        stage: the stage's name, which becomes the job type.
        run_id: id of the run; a new one where it is None.
        explicit: settings that the stage asks for by name.
        nonce: the same when a call that was cut off is made again.
    """

    stage: str
    run_id: str | None
    explicit: dict[str, Any]
    nonce: str


class StageRunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One run that a stage has of its own.

    Attributes:
        state: ``running``, or how it ended: ``finished``, ``failed`` or ``crashed``.
        received_rows: rows that the service has of it.
        backlog_rows: finished rows that W&B does not have yet.
        sink: how W&B's side keeps up.
    """

    run: RunInfo
    state: str
    received_rows: int
    backlog_rows: int
    sink: SinkStatus


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One rank that is not where it should be.

    Attributes:
        step: the furthest step that it logged; None before the first.
        silent_s: seconds since its last row, or since it attached; of one that has logged nothing
            in this run, since others have, and of one that never came, since their first row.
        hostname, pid: its process; empty and 0 where none has attached.
        reason: what is wrong with it, as part of a sentence.
    """

    rank: int
    step: int | float | None
    silent_s: float
    hostname: str
    pid: int
    reason: str


class StageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The ranks of one stage: those of its latest start.

    Attributes:
        run_id: the run that it logs to.
        world_size: how many ranks there are to be.
        attached: how many have come; those that go on while another rank came again as a new
            process are among them.
        ended: how many of these are over: closed, or their process has ended.
        step: the furthest step of any; None before the first row.
        last_row_s: seconds since the last row of any; None before the first.
        step_s: longest time between two of the latest steps, in seconds.
        slow: ranks that lag or are silent, the most silent first; the first 20 of them.
        slow_ranks: how many there are.
        warning: what is wrong, in one sentence.
    """

    stage: str
    run_id: str
    world_size: int
    attached: int
    ended: int
    step: int | float | None
    last_row_s: float | None
    step_s: float | None
    slow: list[RankStatus]
    slow_ranks: int
    warning: str | None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The service at one moment.

    Attributes:
        run: the present run, or the last one after ``finish()``.
        address: ``host:port`` that sources send to.
        received_rows: rows in the ledger that belong to the present run.
        outbox_rows: finished rows, numbered for W&B.
        backlog_rows: finished rows that W&B does not have yet: online those that its server has
            not shown, offline those that its client has not taken.
        lost: rows that could not be kept, by reason, over all sources.
        rejected: values that ``log()`` refused, over all sources.
        after_finish_rows: rows that came after ``finish()`` and belong to no run yet.
        silence_s: a source that was not heard for longer is silent, in seconds; of very many
            sources each is asked to say less often that it lives.
        unconfirmed: sources that fell silent, and whose journal cannot be had.
        problems: what is wrong at present, each in one sentence.
        undelivered_updates: tables, artifacts and alerts that W&B does not have, and why.
        stage_runs: runs that stages have of their own.
        nodes: the cluster's nodes, those that are there first.
        stages: stages whose rows come from ranks.
        warnings: what is not as one would expect, each in one sentence: ranks that hang, nodes
            whose versions differ, nodes that could not be probed or read.
        live: what the newest rows say.
    """

    version: str
    run: RunInfo
    finished: bool
    address: str | None
    incarnation: int
    received_rows: int
    outbox_rows: int
    backlog_rows: int
    lost: dict[str, int]
    rejected: int
    after_finish_rows: int
    sink: SinkStatus
    sources: list[SourceStatus]
    problems: list[str]
    silence_s: float = 30.0
    unconfirmed: list[UnconfirmedSource] = []
    undelivered_updates: list[str] = []
    stage_runs: list[StageRunStatus] = []
    nodes: list[NodeStatus] = []
    stages: list[StageStatus] = []
    warnings: list[str] = []
    live: Live = Live()


class PageAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a service shows its page. It goes to whoever may call the actor, and is in no status.

    Attributes:
        mode: who is let in: ``loopback``, ``network`` or ``off``.
        hostname: the head node's.
        loopback_port: port on the head node's loopback; None where none could be had.
        address: ``host:port`` that sources send to, and that the page answers on in the mode
            ``network``.
        token: what a viewer shows there; None in the other modes.
    """

    mode: str
    hostname: str
    loopback_port: int | None
    address: str
    token: str | None = None


class FinishReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended, in numbers; once complete, a second ``finish()`` returns the same one.

    Attributes:
        state: what W&B shows: ``finished``, ``failed``, ``crashed``, or ``running`` while the
            run is not ended there.
        received_rows: rows logged by all sources up to the cut.
        delivered_rows: rows that are in W&B's files (offline) or with its server (online).
        undelivered_rows: rows that are safe on disk in ``run.dir``, but not with W&B.
        undelivered_updates: tables, artifacts and alerts that are not, each with the reason.
        lost: rows that could not be kept, by reason.
        rejected: values that ``log()`` refused.
        complete: nothing is undelivered, no update either, W&B has closed the run, and no source
            is unconfirmed but quiet ones.
        message: what is undelivered and where it lies, when something is.
        unconfirmed: sources whose last rows may be missing: their journal could not be had.
        stage_runs: how the runs ended that stages had of their own meanwhile.
    """

    run: RunInfo
    exit_code: int
    received_rows: int
    delivered_rows: int
    undelivered_rows: int
    lost: dict[str, int]
    rejected: int
    complete: bool
    message: str | None = None
    unconfirmed: list[UnconfirmedSource] = []
    state: str = "finished"
    undelivered_updates: list[str] = []
    stage_runs: list[FinishReport] = []


class RecoveryReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``raywb recover`` found in a directory, and what it did.

    Attributes:
        runs: the runs that it brought to W&B, each with how it ended.
        ledger_rows: rows in the ledger, over all runs of the directory.
        new_rows: those among them that journals on this machine brought.
        after_finish_rows: rows that came after ``finish()`` and belong to no run yet.
        journals: journals of this cluster that were found.
        foreign_journals: journals of other clusters that were passed over.
        failed: journals that could not be brought home, by source, with the reason.
        damage: what could not be read, by kind.
        unconfirmed: see :class:`FinishReport`.
    """

    directory: str
    runs: list[FinishReport]
    ledger_rows: int
    new_rows: int
    after_finish_rows: int
    journals: int
    foreign_journals: int
    failed: dict[str, str]
    damage: dict[str, int]
    unconfirmed: list[UnconfirmedSource]

    @property
    def nothing_to_do(self) -> bool:
        """Every run was with W&B before, and no journal had anything new."""
        return not self.runs and not self.new_rows and not self.failed

    @property
    def complete(self) -> bool:
        """Everything that was found is with W&B."""
        return not self.failed and not any(
            run.undelivered_rows or run.undelivered_updates for run in self.runs
        )


class SyncedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a directory at W&B's server.

    Attributes:
        rows: rows that the server is to have.
        rows_before: those that it had.
        rows_sent: those that were sent now.
        state: what W&B shows; ``running`` while the run is not ended there.
        error: why it is not there.
    """

    run: RunInfo
    rows: int
    rows_before: int
    rows_sent: int
    state: str
    error: str | None = None


class SyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``raywb sync`` did for each run of a directory."""

    directory: str
    runs: list[SyncedRun]

    @property
    def complete(self) -> bool:
        """The server has all rows, tables, artifacts and alerts of all runs."""
        return all(run.error is None for run in self.runs)
