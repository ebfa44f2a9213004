"""How a run ended, in numbers and in a sentence for whoever has to do something about it."""

from __future__ import annotations

from collections.abc import Sequence

from raywb.reports import FinishReport, UnconfirmedSource
from raywb.service.state import RunState

__all__ = ["make_report", "missing_rows", "state_of"]

#: Unconfirmed sources that a finish report's message names one by one.
_NAMED_SOURCES = 3


def make_report(
    run: RunState,
    *,
    outstanding: int,
    updates: Sequence[str],
    logged: int,
    delivered: int,
    closed: bool,
    error: str | None,
    stage_runs: Sequence[FinishReport] = (),
) -> FinishReport:
    """The report of a run whose cut was taken.

    One row of a run may stand for a row of each rank, and what raywb itself wrote into it is no
    row that anybody logged; the report counts what was logged.

    Args:
        run: the run.
        outstanding: rows that W&B is to have, and does not have.
        updates: tables, artifacts and alerts that W&B does not have, each with the reason.
        logged: what was logged into the rows that it is to have.
        delivered: what was logged into the rows that it has.
        closed: W&B has ended the run, or has all of one that is left as crashed.
        error: what W&B's side said last, when that was an error.
        stage_runs: how the runs ended that stages had of their own.
    """
    undelivered = max(logged - delivered, 0)
    doubtful = [source for source in run.unconfirmed if not source.quiet]
    texts = [f"node {node_id[:8]} was not reached" for node_id in run.unreached]
    if doubtful:
        texts.append(_describe(doubtful))
    if outstanding or not closed:
        why = f" ({error})" if error else ""
        texts.append(
            f"{undelivered} rows are not with W&B yet{why}. They are safe in {run.info.dir}: "
            "delivery goes on as long as the service runs, and after that "
            f"`raywb sync {run.info.dir}` delivers them"
        )
    if updates:
        texts.append(
            f"W&B does not have {'; '.join(updates)}. What came of it is safe in {run.info.dir}"
        )
    texts += [f"run {one.run.name}: {one.message}" for one in stage_runs if one.message is not None]
    return FinishReport(
        run=run.info,
        exit_code=run.exit_code or 0,
        received_rows=run.received_rows,
        delivered_rows=delivered,
        undelivered_rows=undelivered,
        lost=run.lost,
        rejected=run.rejected,
        complete=closed
        and not (outstanding or updates or doubtful or run.unreached)
        and all(one.complete for one in stage_runs),
        stage_runs=list(stage_runs),
        message="; ".join(texts) or None,
        undelivered_updates=list(updates),
        unconfirmed=run.unconfirmed,
        state=state_of(run) if closed else "running",
    )


def missing_rows(unconfirmed: Sequence[UnconfirmedSource]) -> int:
    """Rows that are known to be missing; there may be others that nobody heard of."""
    return sum(source.unacknowledged_rows or 0 for source in unconfirmed)


def _describe(unconfirmed: Sequence[UnconfirmedSource]) -> str:
    named = [
        f"{source.source_id[:8]} on {source.hostname or 'an unknown host'} ({source.reason})"
        for source in unconfirmed[:_NAMED_SOURCES]
    ]
    more = len(unconfirmed) - len(named)
    return (
        f"{len(unconfirmed)} sources are unconfirmed, with at least {missing_rows(unconfirmed)} "
        f"rows that never arrived: {', '.join(named)}{f' and {more} more' if more > 0 else ''}"
    )


def state_of(run: RunState) -> str:
    """What W&B shows for a run that was ended, or left as crashed."""
    if run.crashed:
        return "crashed"
    return "failed" if run.exit_code else "finished"
