"""How a run ended, in numbers and in a sentence for whoever has to do something about it."""

from __future__ import annotations

from raywb.reports import FinishReport
from raywb.service.state import RunState

__all__ = ["make_report", "state_of"]


def make_report(
    run: RunState, *, rows: int, delivered: int, own_rows: int, closed: bool, error: str | None
) -> FinishReport:
    """The report of a run whose cut was taken.

    Args:
        run: the run.
        rows: rows that W&B is to have.
        delivered: rows that it has.
        own_rows: rows among them that raywb itself wrote.
        closed: W&B has ended the run, or has all of one that is left as crashed.
        error: what W&B's side said last, when that was an error.
    """
    undelivered = max(rows - delivered, 0)
    texts = list(run.outstanding)
    if undelivered or not closed:
        why = f" ({error})" if error else ""
        texts.append(
            f"{undelivered} rows are not with W&B yet{why}. They are safe in {run.info.dir}: "
            "delivery goes on as long as the service runs, and after that "
            f"`raywb sync {run.info.dir}` delivers them"
        )
    return FinishReport(
        run=run.info,
        exit_code=run.exit_code or 0,
        received_rows=run.received_rows,
        # What raywb itself wrote into the run is no row that anybody logged.
        delivered_rows=max(delivered - own_rows, 0),
        undelivered_rows=undelivered,
        lost=run.lost,
        unconfirmed=run.unconfirmed,
        rejected=run.rejected,
        complete=closed and not undelivered and not run.outstanding,
        message="; ".join(texts) or None,
        state=state_of(run) if closed else "running",
    )


def state_of(run: RunState) -> str:
    """What W&B shows for a run that was ended, or left as crashed."""
    if run.crashed:
        return "crashed"
    return "failed" if run.exit_code else "finished"
