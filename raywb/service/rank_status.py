"""Which ranks lag, are silent, or hang together: what ``raywb status`` says of each stage.

Three things tell that something hangs, and none of them alone:

* others go on, and a rank does not;
* a rank's process says nothing at all, though it should say that it lives every few seconds: it
  is stopped, cut off, or killed. In synchronous training this names the culprit, since all the
  others wait for it and nobody is behind;
* no rank logs anything for much longer than a step used to take: they hang together, or are done
  and were not closed.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from raywb.reports import RankStatus, StageStatus
from raywb.service.delivery import Delivery
from raywb.service.ingest import Ingest
from raywb.service.ranks import Attempt
from raywb.service.runs import Runs

__all__ = ["stage_statuses"]

#: Time that a rank may be behind, or silent while others go on, before it is named, in seconds.
LAG_S = 10.0

#: The same of a whole stage, in seconds.
STALL_S = 15.0

#: How many of its longest steps a rank may be silent while others go on, and a whole stage.
LAG_STEPS = 2
STALL_STEPS = 3

#: Time after a stage's first row in which every rank should have attached, in seconds.
ATTACH_S = 30.0

#: Ranks that are told one by one; the sentence names fewer.
MOST_RANKS = 20
NAMED_RANKS = 3


class _Look(NamedTuple):
    """One attempt at one moment."""

    delivery: Delivery
    ingest: Ingest
    attempt: Attempt
    now_s: float


def stage_statuses(
    delivery: Delivery, ingest: Ingest, runs: Runs, run_id: str
) -> list[StageStatus]:
    """Each stage of the present run that has ranks.

    Args:
        delivery: what was received.
        ingest: who was heard.
        runs: knows the runs that stages have of their own.
        run_id: id of the cluster's run.
    """
    own = {one.run.epoch: one for one in runs.stages.status()}
    now_s, found = time.monotonic(), []
    for stage, attempt in delivery.merge.attempts:
        look = _Look(delivery, ingest, attempt, now_s)
        if not stage.run:
            found.append(_status(look, stage.prefix.rstrip("/"), run_id))
        elif stage.run in own and own[stage.run].state == "running":
            run = own[stage.run].run
            found.append(_status(look, run.job_type or run.name, run.id))
    return found


def _status(look: _Look, name: str, run_id: str) -> StageStatus:
    attempt, pace = look.attempt, look.attempt.pace
    going = [rank for rank in range(attempt.world_size) if not _is_over(look, rank)]
    # Whoever was killed is over, and yet missing as long as others go on.
    slow = [one for rank in range(attempt.world_size) if (one := _slow(look, rank, going))]
    slow.sort(key=lambda one: -one.silent_s)
    front = pace.front[-1][0] if pace.front else None
    last_s = look.now_s - max(pace.heard.values()) if pace.heard else None
    attached = len(attempt.sources)
    return StageStatus(
        stage=name,
        run_id=run_id,
        world_size=attempt.world_size,
        attached=attached,
        ended=attempt.world_size - len(going) - (attempt.world_size - attached),
        step=front,
        last_row_s=None if last_s is None else round(last_s, 1),
        step_s=None if pace.step_s is None else round(pace.step_s, 3),
        slow=slow[:MOST_RANKS],
        slow_ranks=len(slow),
        warning=_warning(look, name, slow, going, last_s),
    )


def _is_over(look: _Look, rank: int) -> bool:
    """Whether nothing more is to be expected of a rank."""
    source_id = look.attempt.sources.get(rank)
    if source_id is None:
        return False
    source = look.delivery.merge.sources.get(source_id)
    return rank in look.attempt.ended or (source is not None and source.ended)


def _slow(look: _Look, rank: int, going: list[int]) -> RankStatus | None:
    """What is wrong with a rank, if anything."""
    attempt, pace = look.attempt, look.attempt.pace
    source_id = attempt.sources.get(rank)
    if source_id is None:
        late = pace.first_s is not None and look.now_s - pace.first_s > ATTACH_S
        waited_s = look.now_s - (pace.first_s or look.now_s)
        return _told(look, rank, waited_s, "has not attached") if late else None
    silent_s = look.now_s - pace.heard.get(rank, look.delivery.began_s)
    if source_id in look.delivery.liveness.killed:
        return _told(look, rank, silent_s, "was killed") if going else None
    if _is_over(look, rank):
        return None
    heard_at = look.ingest.heard.get(source_id, look.delivery.began_s)
    unheard_s = look.now_s - heard_at
    if unheard_s > 1.5 * look.ingest.keep_alive_s + look.ingest.pace_s:
        reason = f"its process was not heard for {unheard_s:.0f} s: stopped, cut off or killed"
        return _told(look, rank, silent_s, reason)
    passed_at = pace.passed_at(attempt.progress.get(rank))
    grace_s = LAG_S + look.ingest.pace_s
    if passed_at is None or look.now_s - passed_at < grace_s:
        return None
    if silent_s > max(grace_s, LAG_STEPS * (pace.step_s or 0.0)):
        return _told(look, rank, silent_s, f"logged nothing for {silent_s:.0f} s")
    if rank not in pace.heard:
        return None
    behind_s = look.now_s - passed_at
    return _told(look, rank, silent_s, f"is {behind_s:.0f} s behind the first")


def _told(look: _Look, rank: int, silent_s: float, reason: str) -> RankStatus:
    source = look.delivery.merge.sources.get(look.attempt.sources.get(rank, ""))
    hello = source.hello if source is not None else None
    return RankStatus(
        rank=rank,
        step=look.attempt.progress.get(rank),
        silent_s=round(silent_s, 1),
        hostname=hello.hostname if hello else "",
        pid=hello.pid if hello else 0,
        reason=reason,
    )


def _warning(
    look: _Look, name: str, slow: list[RankStatus], going: list[int], last_s: float | None
) -> str | None:
    """The stage's trouble in one sentence."""
    pace = look.attempt.pace
    front = pace.front[-1][0] if pace.front else None
    if slow:
        told = "; ".join(_sentence(one) for one in slow[:NAMED_RANKS])
        more = f"; and {len(slow) - NAMED_RANKS} more ranks" if len(slow) > NAMED_RANKS else ""
        at = "no rank has logged yet" if front is None else f"the furthest is at step {front:g}"
        return f"{name}: {told}{more}; {at}"
    if last_s is None or pace.step_s is None or not going:
        return None
    if last_s < max(STALL_S + look.ingest.pace_s, STALL_STEPS * pace.step_s):
        return None
    return (
        f"{name}: no rank has logged for {last_s:.0f} s, where a step took {pace.step_s:.2g} s at "
        f"most; all are at step {front:g}: they hang together, or are done and were not closed"
    )


def _sentence(one: RankStatus) -> str:
    where = f" ({one.hostname} pid {one.pid})" if one.pid else ""
    at = "" if one.step is None else f" at step {one.step:g}"
    return f"rank {one.rank}{where}{at} {one.reason}"
