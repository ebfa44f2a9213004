"""What the service tells about itself: the run, its state, and how it ended.

These structs cross process boundaries and reach the user, so they are frozen and hold plain
values; none of them ever holds a key or a token.
"""

from __future__ import annotations

import msgspec

__all__ = ["FinishReport", "RunInfo", "SinkStatus", "SourceStatus", "Status"]


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The W&B run that this cluster's updates go to.

    Attributes:
        mode: ``online``, ``offline`` or ``disabled``.
        url: the run's page, once W&B has named one.
        dir: directory of the ledger, the outbox and W&B's own files on the head node.
        group_source: where the group's name came from, as a person would say it.
        epoch: counts the runs of one service, from 1.
        provisional: True while no ``start()`` has brought settings.
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


class SourceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process that logs: who it is, and how far its journal has come.

    Attributes:
        heard_ago_s: seconds since its last request; None when it has not been heard since the
            service was started again, or has ended.
        ended: it said that it ends.
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


class SinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How W&B's side keeps up.

    Attributes:
        state: ``waiting`` (no run yet), ``opening``, ``running``, ``retrying``, ``finished``,
            ``disabled``.
        applied_rows: rows that W&B's client has taken.
        restarts: how often the child process had to be started again.
        last_error: what went wrong last, in one sentence.
    """

    state: str
    applied_rows: int
    restarts: int
    last_error: str | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The service at one moment.

    Attributes:
        run: the present run, or the last one after ``finish()``.
        address: ``host:port`` that sources send to.
        received_rows: rows in the ledger that belong to the present run.
        outbox_rows: finished rows, numbered for W&B.
        backlog_rows: finished rows that W&B has not taken.
        lost: rows that could not be kept, by reason, over all sources.
        rejected: values that ``log()`` refused, over all sources.
        after_finish_rows: rows that came after ``finish()`` and belong to no run yet.
        problems: what is wrong at present, each in one sentence.
        undelivered_updates: tables, artifacts and alerts that W&B does not have, and why.
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
    undelivered_updates: list[str] = []


class FinishReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended, in numbers; a second ``finish()`` returns the same one.

    Attributes:
        received_rows: rows logged by all sources up to the cut.
        delivered_rows: rows that are in W&B's files (offline) or with its server (online).
        undelivered_rows: rows that are safe on disk in ``run.dir``, but not with W&B.
        undelivered_updates: tables, artifacts and alerts that are not, each with the reason.
        lost: rows that could not be kept, by reason.
        rejected: values that ``log()`` refused.
        complete: nothing is undelivered, and W&B has closed the run.
        message: what is undelivered and where it lies, when something is.
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
    undelivered_updates: list[str] = []
