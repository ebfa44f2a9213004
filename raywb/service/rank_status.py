"""Which ranks lag, are silent, or hang together: what ``raywb status`` says of each stage.

Three things tell that something hangs, and none of them alone:

* others go on, and a rank does not;
* a rank's process says nothing at all, though it should say that it lives every few seconds: it
  is stopped, cut off, or killed. In synchronous training this names the culprit, since all the
  others wait for it and nobody is behind;
* no rank logs anything for much longer than a step, or a pause, used to take, and their processes
  log for no other stage: they hang together, or are done and were not closed.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from raywb.reports import RankStatus, StageStatus
from raywb.service.delivery import Delivery
from raywb.service.ingest import Ingest
from raywb.service.pace import Pace
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

#: How many of its longest pauses, which a validation or a checkpoint makes, a stage may be silent.
STALL_PAUSES = 2

#: Time for which a rank is named that attached and has logged nothing while others do, in
#: seconds. After that it seems to take no part: in some stages only rank 0 logs.
UNHEARD_S = 600.0

#: Time after a stage's first row in which every rank should have attached, in seconds.
ATTACH_S = 30.0

#: Ranks that are told one by one; the sentence names fewer.
MOST_RANKS = 20
NAMED_RANKS = 3


class _Look(NamedTuple):
    """One stage at one moment.

    Attributes:
        attempt: the latest.
        members: the attempt and the source of each rank that came. One whose process goes on in
            an earlier attempt, since another rank came again alone, is there as well.
        over: those of which nothing more is to be expected.
        is_shared: workers of another job log to the stage at the same time.
        goes_on: there is one of which more is.
    """

    delivery: Delivery
    ingest: Ingest
    attempt: Attempt
    members: dict[int, tuple[Attempt, str]]
    over: set[int]
    is_shared: bool
    now_s: float

    @property
    def goes_on(self) -> bool:
        return len(self.over) < len(self.members)

    @property
    def pace(self) -> Pace:
        """That of the latest attempt in which anything was logged."""
        if not self.attempt.pace.front:
            for attempt, _ in self.members.values():
                if attempt.pace.front:
                    return attempt.pace
        return self.attempt.pace


class _Slow(NamedTuple):
    """A rank that is not where it should be; ``reason`` has a place for ``for_s``."""

    silent_s: float
    rank: int
    reason: str
    for_s: float = 0.0


def stage_statuses(
    delivery: Delivery, ingest: Ingest, runs: Runs, run_id: str, now_s: float
) -> list[StageStatus]:
    """Each stage of the present run that has ranks.

    Args:
        delivery: what was received.
        ingest: who was heard.
        runs: knows the runs that stages have of their own.
        run_id: id of the cluster's run.
        now_s: the present on the monotonic clock.
    """
    own = {one.run.epoch: one for one in runs.stages.status()}
    found = []
    for stage, attempts in delivery.merge.attempts:
        if stage.run and (stage.run not in own or own[stage.run].state != "running"):
            continue
        look = _look(delivery, ingest, attempts, now_s)
        if not stage.run:
            found.append(_status(look, stage.prefix.rstrip("/"), run_id))
        else:
            run = own[stage.run].run
            found.append(_status(look, run.job_type or run.name, run.id))
    return found


def _look(delivery: Delivery, ingest: Ingest, attempts: Sequence[Attempt], now_s: float) -> _Look:
    *earlier, latest = attempts
    members = {rank: (latest, source_id) for rank, source_id in latest.sources.items()}
    over = {rank for rank in members if _is_over(delivery, latest, rank)}
    taken = set(latest.sources.values())
    silence_s = ingest.silence_s
    is_shared = False
    for attempt in reversed(earlier):
        if not attempt.takes(latest.jobs, latest.has_workers):
            is_shared = is_shared or _goes_on_beside(delivery, attempt, latest, now_s - silence_s)
            continue
        if len(members) >= latest.world_size or attempt.world_size != latest.world_size:
            continue
        for rank, source_id in attempt.sources.items():
            unheard_s = now_s - ingest.heard.get(source_id, delivery.began_s)
            is_here = rank not in members and source_id not in taken and unheard_s <= silence_s
            if is_here and not _is_over(delivery, attempt, rank):
                members[rank] = (attempt, source_id)
        taken.update(attempt.sources.values())
    return _Look(delivery, ingest, latest, members, over, is_shared, now_s)


def _goes_on_beside(delivery: Delivery, attempt: Attempt, latest: Attempt, since_s: float) -> bool:
    """Whether the ranks of another job still come further, after those of the latest began."""
    front, began_s = attempt.pace.front, latest.pace.first_s
    if not front or began_s is None or front[-1][1] < max(began_s, since_s):
        return False
    return any(not _is_over(delivery, attempt, rank) for rank in attempt.sources)


def _is_over(delivery: Delivery, attempt: Attempt, rank: int) -> bool:
    """Whether nothing more is to be expected of a rank that came."""
    source = delivery.merge.sources.get(attempt.sources[rank])
    return rank in attempt.ended or (source is not None and source.ended)


def _status(look: _Look, name: str, run_id: str) -> StageStatus:
    pace, world_size = look.pace, look.attempt.world_size
    count = 0

    def slow_members() -> Iterator[_Slow]:
        nonlocal count
        for rank in look.members:
            if (one := _slow(look, rank)) is not None:
                count += 1
                yield one

    # There may be a million ranks: most are only counted.
    missing, missing_count = _missing(look)
    worst = heapq.nsmallest(
        MOST_RANKS, itertools.chain(slow_members(), missing), key=lambda one: (-one[0], one[1])
    )
    slow = [_told(look, one) for one in worst]
    attempts = {id(look.attempt): look.attempt}
    attempts |= {id(attempt): attempt for attempt, _ in look.members.values()}
    heard = [max(one.pace.heard.values()) for one in attempts.values() if one.pace.heard]
    last_s = look.now_s - max(heard) if heard else None
    return StageStatus(
        stage=name,
        run_id=run_id,
        world_size=world_size,
        attached=len(look.members),
        ended=len(look.over),
        step=pace.front[-1][0] if pace.front else None,
        last_row_s=None if last_s is None else round(last_s, 1),
        step_s=None if pace.step_s is None else round(pace.step_s, 3),
        slow=slow,
        slow_ranks=count + missing_count,
        warning=_warning(look, name, slow, count + missing_count, last_s),
    )


def _missing(look: _Look) -> tuple[list[_Slow], int]:
    """Ranks that have not attached although others go on: the first of them, and how many."""
    first_s, world_size = look.pace.first_s, look.attempt.world_size
    count = world_size - len(look.members)
    if not count or first_s is None or not look.goes_on or look.now_s - first_s <= ATTACH_S:
        return [], 0
    absent = (rank for rank in range(world_size) if rank not in look.members)
    waited_s = look.now_s - first_s
    first = itertools.islice(absent, MOST_RANKS)
    return [_Slow(waited_s, rank, "has not attached") for rank in first], count


def _slow(look: _Look, rank: int) -> _Slow | None:
    """What is wrong with a rank that came, if anything."""
    attempt, source_id = look.members[rank]
    pace, ingest, began_s = attempt.pace, look.ingest, look.delivery.began_s
    came_s = attempt.came_s.get(rank, began_s)
    silent_s = look.now_s - max(pace.heard.get(rank, came_s), came_s)
    # Whoever was killed is over, and yet missing as long as others go on.
    if source_id in look.delivery.liveness.killed:
        return _Slow(silent_s, rank, "was killed") if look.goes_on else None
    if rank in look.over:
        return None
    unheard_s = look.now_s - ingest.heard.get(source_id, began_s)
    if unheard_s > 1.5 * ingest.keep_alive_s + ingest.pace_s:
        reason = "its process was not heard for {:.0f} s: stopped, cut off or killed"
        return _Slow(silent_s, rank, reason, unheard_s)
    return _behind(look, rank, came_s, silent_s)


def _behind(look: _Look, rank: int, came_s: float, silent_s: float) -> _Slow | None:
    """What is wrong with a rank whose process lives: others went on, and it did not."""
    attempt, _ = look.members[rank]
    pace, has_logged = attempt.pace, rank in attempt.pace.heard
    passed_at = pace.passed_at(attempt.progress.get(rank))
    if passed_at is None or pace.first_s is None:
        return None
    if not has_logged:
        passed_at = pace.first_s
    behind_s = look.now_s - max(passed_at, came_s)
    grace_s = LAG_S + look.ingest.pace_s
    if behind_s < grace_s:
        return None
    if not has_logged:
        silent_s = min(silent_s, behind_s)
        if silent_s > UNHEARD_S:
            return None  # it seems to take no part
    if silent_s > max(grace_s, LAG_STEPS * (pace.step_s or 0.0)):
        return _Slow(silent_s, rank, "logged nothing for {:.0f} s", silent_s)
    if not has_logged:
        return None
    return _Slow(silent_s, rank, "is {:.0f} s behind the first", behind_s)


def _told(look: _Look, one: _Slow) -> RankStatus:
    attempt, source_id = look.members.get(one.rank, (look.attempt, ""))
    source = look.delivery.merge.sources.get(source_id)
    hello = source.hello if source is not None else None
    return RankStatus(
        rank=one.rank,
        step=attempt.progress.get(one.rank),
        silent_s=round(one.silent_s, 1),
        hostname=hello.hostname if hello else "",
        pid=hello.pid if hello else 0,
        reason=one.reason.format(one.for_s),
    )


def _warning(
    look: _Look, name: str, slow: list[RankStatus], slow_ranks: int, last_s: float | None
) -> str | None:
    """The stage's trouble in one sentence."""
    pace = look.pace
    front = pace.front[-1][0] if pace.front else None
    if slow:
        told = "; ".join(_sentence(one) for one in slow[:NAMED_RANKS])
        more = f"; and {slow_ranks - NAMED_RANKS} more ranks" if slow_ranks > NAMED_RANKS else ""
        at = "no rank has logged yet" if front is None else f"the furthest is at step {front:g}"
        return f"{name}: {told}{more}; {at}"
    if look.is_shared:
        return (
            f"{name}: two jobs log to it at the same time; their ranks are kept apart, but the "
            "rows of both lie on its one step axis: give each job a stage name of its own"
        )
    if last_s is None or pace.step_s is None or not look.goes_on:
        return None
    pause_s = pace.pause_s(look.now_s)
    limit_s = max(STALL_S + look.ingest.pace_s, STALL_STEPS * pace.step_s, STALL_PAUSES * pause_s)
    if last_s < limit_s or look.now_s - _last_elsewhere(look) < limit_s:
        return None
    longest_s = max(pace.step_s, pause_s)
    return (
        f"{name}: no rank has logged for {last_s:.0f} s, where a step took {longest_s:.2g} s at "
        f"most; all are at step {front:g}: they hang together, or are done and were not closed"
    )


def _last_elsewhere(look: _Look) -> float:
    """When a process of the stage last logged for another stage, for instance a validation."""
    latest_s = -math.inf
    for attempt, source_id in look.members.values():
        source = look.delivery.merge.sources.get(source_id)
        if source is not None:
            latest_s = max(latest_s, source.alone_s)
            for seat in source.seats.values():
                if seat.attempt is not attempt:
                    latest_s = max(latest_s, seat.attempt.pace.heard.get(seat.rank, -math.inf))
    return latest_s


def _sentence(one: RankStatus) -> str:
    where = f" ({one.hostname} pid {one.pid})" if one.pid else ""
    at = "" if one.step is None else f" at step {one.step:g}"
    return f"rank {one.rank}{where}{at} {one.reason}"
