"""The service's answer to "how is it going": put together from its parts, changing none."""

from __future__ import annotations

import time

from raywb import __version__
from raywb.live import Live
from raywb.reports import RunInfo, SourceStatus, Status
from raywb.service.delivery import Delivery
from raywb.service.ingest import Ingest
from raywb.service.node_metrics import stale_s
from raywb.service.rank_status import stage_statuses
from raywb.service.run_settings import settings_of
from raywb.service.runs import Runs

__all__ = ["make_status"]


def make_status(
    delivery: Delivery,
    ingest: Ingest,
    runs: Runs,
    *,
    info: RunInfo,
    address: str,
    incarnation: int,
    restored: int,
    problems: dict[str, str],
) -> Status:
    """The service at this moment.

    Args:
        delivery: what was received.
        ingest: who was heard, and what was refused.
        runs: the runs and their sinks.
        info: the last run, or what the first one will be like.
        address: where the service listens.
        incarnation: how often it was started.
        restored: how often its state came from the copy.
        problems: what is wrong in the background, by part.
    """
    run = runs.last
    merge = delivery.merge
    found = list(problems.values())
    if ingest.ledger_error:
        found.append(ingest.ledger_error)
    finished = run is not None and run.report is not None
    stages = [] if finished else stage_statuses(delivery, ingest, runs, info.id, time.monotonic())
    sink = runs.sink_status(run)
    if sink.state == "no key" and sink.last_error:
        found.append(sink.last_error)
    found += _damage(delivery)
    if restored:
        found.append(f"service.json was damaged on disk {restored} times; its copy was used")
    found += [f"{count} requests refused: {reason}" for reason, count in ingest.refused.items()]
    live = _live(delivery, runs)
    warnings = [one.warning for one in stages if one.warning]
    return Status(
        version=__version__,
        run=info,
        finished=finished,
        address=address,
        incarnation=incarnation,
        received_rows=merge.rows,
        outbox_rows=runs.rows_of(run) if run else 0,
        backlog_rows=runs.backlog(run) if run else 0,
        lost=runs.lost(),
        rejected=merge.rejected,
        after_finish_rows=delivery.waiting_rows() if runs.open is None else 0,
        sink=sink,
        sources=_sources(delivery, ingest),
        problems=found,
        silence_s=round(ingest.silence_s, 1),
        unconfirmed=delivery.unconfirmed(),
        undelivered_updates=runs.undelivered_updates(run),
        stage_runs=runs.stages.status(),
        stages=stages,
        warnings=warnings + _live_warnings(delivery, live),
        live=live,
    )


def _live(delivery: Delivery, runs: Runs) -> Live:
    """What the newest rows of the last run say, and those of the runs that stages have in it."""
    run = runs.last
    if run is None:
        return Live()
    numbers = [run.number, *(one.number for one in runs.stages.of(run))]
    interval_s = settings_of(run).node_metrics_interval_s
    is_read = runs.open is run and interval_s and runs.sink_status(run).state != "resting"
    return delivery.live_rows.live(
        numbers,
        now_s=time.time() if is_read else None,
        nodes_stale_s=stale_s(interval_s, delivery.live_rows.nodes_alive(numbers)),
    )


def _live_warnings(delivery: Delivery, live: Live) -> list[str]:
    """What the views do not show; W&B has it all."""
    found = []
    if live.untracked_series or live.dropped_stages:
        found.append(
            f"{live.untracked_series} series and {live.dropped_stages} stages are more than "
            f"raywb's views can follow, and are not shown there; W&B has them"
        )
    view = delivery.live_rows
    if view.failures:
        found.append(
            f"{view.failures} times a row could not be taken in or shown by raywb's views, which "
            f"may lack something; W&B has all rows (the last time: {view.problem})"
        )
    return found


def _damage(delivery: Delivery) -> list[str]:
    """What the disk did to the service's own files; the losses say what it cost."""
    files = {"ledger": delivery.ledger.damaged, "outbox": delivery.outbox.damaged}
    return [
        f"{count} stretches of the {name} were damaged on disk; what was left of them was used"
        for name, count in files.items()
        if count
    ]


def _sources(delivery: Delivery, ingest: Ingest) -> list[SourceStatus]:
    now = time.monotonic()
    return [
        SourceStatus(
            source_id=source_id,
            hostname=source.hello.hostname,
            node_id=source.hello.node_id,
            pid=source.hello.pid,
            stages=sorted({c.stage for c in source.channels.values() if c.stage}),
            received_bytes=delivery.ledger.end_of(source_id),
            received_rows=source.rows,
            heard_ago_s=(
                None
                if source_id not in delivery.liveness.open or source_id not in ingest.heard
                else round(now - ingest.heard[source_id], 3)
            ),
            ended=delivery.liveness.has_ended(source_id),
            killed=source_id in delivery.liveness.killed,
        )
        for source_id, source in delivery.merge.sources.items()
        if source.hello is not None
    ]
