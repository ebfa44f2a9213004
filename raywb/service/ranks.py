"""Rows of many ranks at one step: which of them belong together, and when to stop waiting.

Ranks of one stage form an *attempt*. A rank that comes again as another process opens a new one,
so steps that are replayed after a checkpoint do not meet those from before it; workers of another
Ray job have attempts of their own. Within one a *group* collects what its ranks log at one step,
and is done when

* every rank that takes part has logged the step, or
* for a while, and those that are missing have gone on to later steps, or
* for a longer while: a rank that was silent so long is no longer waited for until it logs again.

A rank that logs one key twice at a step begins a second round of it. Nothing here does I/O or
reads a clock; waiting uses the time that the caller gives.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from raywb.across_ranks import combined
from raywb.rows import Hello, Scalar
from raywb.service.pace import Pace

__all__ = ["Attempt", "Group", "Part", "RankMerge", "Seat", "Stage", "Waiting"]

#: Most rows that wait for other ranks at one time; beyond it the oldest groups wait no longer.
MAX_WAITING_ROWS = 200_000

#: Groups that an attempt remembers after they were done, to know a late row as one.
REMEMBERED_GROUPS = 10_000

_Step = int | float
_Key = tuple[_Step, int]

#: Jobs of a source that did not say it, and whether it is a worker.
_UNKNOWN_JOB: tuple[frozenset[str], bool] = (frozenset(), False)


class Waiting(NamedTuple):
    """How long a group waits, in seconds: for ranks that went on, and for silent ones."""

    passed_s: float
    silent_s: float


@dataclasses.dataclass(slots=True)
class Part:
    """What one rank has logged for a group."""

    rank: int
    time_s: float
    metrics: dict[str, Scalar]


class Stage(NamedTuple):
    """What ranks have in common: the number of a run of their own, else 0, and the prefix."""

    run: int
    prefix: str


class Seat(NamedTuple):
    """A source's place among the ranks of a stage."""

    run: int
    prefix: str
    attempt: Attempt
    rank: int


@dataclasses.dataclass(slots=True)
class Group:
    """The rows of one step that become one.

    Attributes:
        run: number of the stage's own run; 0 for the cluster's.
        prefix: what stands before the keys of the stage, with its slash.
        step: the users' step.
        parts: by rank.
        frames: which bytes of which source it was made of, one entry for each row.
        position: ledger position before which none of its rows lies.
        late: a row of this step was finished before without these ranks.
    """

    run: int
    prefix: str
    step: _Step
    opened_s: float
    position: int
    late: bool
    missing: int
    parts: dict[int, Part] = dataclasses.field(default_factory=dict)
    frames: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

    @property
    def time_s(self) -> float:
        """When the last of its ranks logged it."""
        return max(part.time_s for part in self.parts.values())

    def metrics(self, kind_of: Callable[[str], str]) -> dict[str, Scalar]:
        """The values of the merged row, keys relative to the stage.

        ``ranks`` says how many took part; of more than one, ``slowest_rank`` names the last, and
        ``rank_spread_s`` is how much later than the first it was.

        Args:
            kind_of: how the values of a key, given in full, become one; see
                :data:`raywb.rows.ACROSS_RANKS`.
        """
        parts = [self.parts[rank] for rank in sorted(self.parts)]
        keys = parts[0].metrics.keys()
        alike = all(part.metrics.keys() == keys for part in parts)
        merged: dict[str, Scalar] = {}
        for key in keys if alike else {key: 0 for part in parts for key in part.metrics}:
            having = parts if alike else [part for part in parts if key in part.metrics]
            kind = kind_of(self.prefix + key)
            if kind == "per_rank":
                for part in having:
                    merged[f"{key}/rank_{part.rank}"] = part.metrics[key]
            elif kind == "last":
                merged[key] = max(having, key=_time_of).metrics[key]
            else:
                merged[key] = combined(kind, [part.metrics[key] for part in having])
        merged["ranks"] = len(parts)
        if len(parts) > 1:
            slowest = max(parts, key=_time_of)
            merged["slowest_rank"] = slowest.rank
            merged["rank_spread_s"] = round(slowest.time_s - min(map(_time_of, parts)), 6)
        return merged


_time_of = operator.attrgetter("time_s")


class Attempt:
    """The ranks that train together, and their unfinished groups in order of opening.

    Attributes:
        sources: the process that each rank is.
        progress: the furthest step of each.
        pace: when they came to it, in this run.
        ended: ranks that were closed, and not opened again.
        opened: how often each was opened; see :meth:`open`.
        came_s: when it was opened last, of those that were opened since the service's start.
        joined: it has a rank that came, or came again, in this run.
        jobs: the Ray jobs of its processes, as far as they are known.
        has_workers: some of these were started by Ray, and are not jobs of their own.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.sources: dict[int, str] = {}
        self.expected = set(range(world_size))
        self.progress: dict[int, _Step] = {}
        self.rounds: dict[int, _Key] = {}
        self.groups: dict[_Key, Group] = {}
        self.done: OrderedDict[_Key, None] = OrderedDict()
        self.pace = Pace()
        self.ended: set[int] = set()
        self.opened: dict[int, int] = {}
        self.came_s: dict[int, float] = {}
        self._rounds_opened = 0
        self.joined = False
        self.jobs: set[str] = set()
        self.has_workers = False

    def takes(self, jobs: Collection[str], has_workers: bool) -> bool:
        """Whether processes of these jobs may train together with those that are here.

        Workers of two jobs do not, whatever ranks they have. Where a launcher such as torchrun
        starts the processes, each is a driver, hence a job of its own: all these are as one.
        """
        if not jobs or not self.jobs or not self.jobs.isdisjoint(jobs):
            return True
        return not (has_workers or self.has_workers)

    def expect(self, rank: int) -> None:
        if rank not in self.expected:
            self.expected.add(rank)
            for group in self.groups.values():
                group.missing += rank not in group.parts

    def open(self, rank: int, has_gone: Callable[[int], bool]) -> None:
        """A rank was opened, perhaps again after it was closed.

        Who attaches anew for every epoch is closed and opened many times, and no two ranks at one
        moment: as soon as the first is opened for the n-th time, the others are waited for to
        come as often.

        Args:
            rank: which one.
            has_gone: whether the process of a rank has ended.
        """
        if rank in self.opened and rank not in self.ended:
            return
        self.ended.discard(rank)
        self.opened[rank] = self.opened.get(rank, 0) + 1
        self.expect(rank)
        if self.opened[rank] > self._rounds_opened:
            self._rounds_opened = self.opened[rank]
            for other in self.ended:
                if not has_gone(other):
                    self.expect(other)

    def close(self, rank: int) -> list[Group]:
        """A rank was closed; returns what is done by it."""
        self.ended.add(rank)
        if self.opened.get(rank, 0) < self._rounds_opened:
            return []  # others were opened again: so will this one be
        return self.no_longer_expect(rank)

    def no_longer_expect(self, rank: int) -> list[Group]:
        """Wait for this rank no more; returns the groups that only it had kept open."""
        if rank not in self.expected:
            return []
        self.expected.discard(rank)
        for group in self.groups.values():
            group.missing -= rank not in group.parts
        return self.take([key for key, group in self.groups.items() if group.missing == 0])

    def key_for(self, rank: int, step: _Step, metrics: dict[str, Scalar]) -> _Key:
        """The step and the round in which a row of this rank belongs."""
        last = self.rounds.get(rank)
        again = last is not None and last[0] == step
        number = last[1] if last is not None and again else 0
        while True:
            group = self.groups.get((step, number))
            part = group.parts.get(rank) if group is not None else None
            if part is not None and not part.metrics.keys().isdisjoint(metrics):
                number += 1  # the same key once more
            elif group is None and again and (step, number) == last:
                number += 1  # its round is done
            else:
                return step, number

    def take(self, keys: list[_Key]) -> list[Group]:
        """Remove groups that are done, and remember that they were."""
        taken = []
        for key in keys:
            taken.append(self.groups.pop(key))
            self.done[key] = None
        while len(self.done) > REMEMBERED_GROUPS:
            self.done.popitem(last=False)
        return taken

    def due(self, now_s: float, waiting: Waiting) -> list[Group]:
        """Groups that have waited long enough."""
        found: list[_Key] = []
        floor: _Step | None = None
        silent: set[int] = set()
        for key, group in self.groups.items():
            waited_s = now_s - group.opened_s
            if waited_s < waiting.passed_s:
                break
            if waited_s >= waiting.silent_s:
                found.append(key)
                silent |= {
                    rank
                    for rank in self.expected - group.parts.keys()
                    if self.progress.get(rank, -math.inf) < group.step
                }
                continue
            if floor is None:
                floor = min(
                    (self.progress.get(rank, -math.inf) for rank in self.expected), default=math.inf
                )
            if group.late or group.step < floor:
                found.append(key)
        taken = self.take(found)
        for rank in silent:
            taken += self.no_longer_expect(rank)
        return taken


class RankMerge:
    """Every stage's attempts.

    Attributes:
        rows: rows that wait for other ranks.
        now_s: the present, as the caller last said; None while it takes over what was before.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.now_s: float | None = None
        self._attempts: dict[Stage, list[Attempt]] = {}
        self._number: dict[tuple[Stage, str, int, int], int] = {}
        self._of_source: dict[str, list[tuple[Attempt, int]]] = {}
        #: The jobs of sources, and whether they are workers.
        self._jobs: dict[str, tuple[frozenset[str], bool]] = {}
        self._gone: set[str] = set()

    def number_of(self, stage: Stage, source_id: str, rank: int, world_size: int) -> int:
        """The attempt that a source's rank belongs to; the first call decides."""
        number = self._number.get((stage, source_id, rank, world_size))
        if number is not None:
            return number
        attempts = self._attempts.get(stage, [])
        number = len(attempts)
        jobs, is_worker = self._jobs.get(source_id, _UNKNOWN_JOB)
        for earlier in range(number - 1, -1, -1):
            attempt = attempts[earlier]
            # Only the latest of those that it may belong to.
            if attempt.takes(jobs, is_worker):
                is_free = attempt.sources.get(rank, source_id) == source_id
                if attempt.world_size == world_size and is_free:
                    number = earlier
                break
        self.assign(stage, source_id, rank, world_size, number)
        return number

    def seat(self, stage: Stage, source_id: str, rank: int, world_size: int) -> Seat:
        """Where rows of a source's rank go; always the same."""
        number = self.number_of(stage, source_id, rank, world_size)
        return Seat(*stage, self._attempts[stage][number], rank)

    def assign(self, stage: Stage, source_id: str, rank: int, world_size: int, number: int) -> None:
        """Put a source's rank into an attempt, as it was decided before a restart."""
        if self._number.get((stage, source_id, rank, world_size)) == number:
            return
        attempts = self._attempts.setdefault(stage, [])
        while len(attempts) <= number:
            attempts.append(Attempt(world_size))
        attempts[number].sources[rank] = source_id
        jobs, is_worker = self._jobs.get(source_id, _UNKNOWN_JOB)
        attempts[number].jobs |= jobs
        attempts[number].has_workers |= is_worker
        self._number[stage, source_id, rank, world_size] = number
        self._of_source.setdefault(source_id, []).append((attempts[number], rank))

    def add(
        self,
        seat: Seat,
        step: _Step,
        part: Part,
        frame: tuple[str, int, int],
        position: int,
        now_s: float,
    ) -> list[Group]:
        """Take a row in; returns the groups that are done by it."""
        run, prefix, attempt, rank = seat
        # A row of a closed rank that comes only now was logged before, and read again.
        if rank not in attempt.expected and rank not in attempt.ended:
            attempt.expect(rank)
        key = attempt.key_for(rank, step, part.metrics)
        group = attempt.groups.get(key)
        if group is None:
            late = key in attempt.done
            missing = len(attempt.expected)
            group = Group(run, prefix, step, now_s, position, late, missing)
            attempt.groups[key] = group
        present = group.parts.get(rank)
        if present is None:
            group.parts[rank] = part
            group.missing -= rank in attempt.expected
        else:
            present.metrics.update(part.metrics)
            present.time_s = part.time_s
        group.frames.append(frame)
        attempt.rounds[rank] = key
        attempt.progress[rank] = max(attempt.progress.get(rank, step), step)
        attempt.pace.note(rank, step, now_s)
        self.rows += 1
        return self._finished(attempt.take([key])) if group.missing == 0 else []

    def end_source(self, source_id: str) -> list[Group]:
        """A source has ended: none of its ranks is waited for; returns what is done by it."""
        found: list[Group] = []
        for attempt, rank in self._of_source.get(source_id, ()):
            found += attempt.no_longer_expect(rank)
        return self._finished(found)

    def open_seat(self, stage: Stage, source_id: str, rank: int, world_size: int) -> int:
        """A source's rank was opened, perhaps again; returns the number of its attempt."""
        number = self.number_of(stage, source_id, rank, world_size)
        attempt = self._attempts[stage][number]
        attempt.joined = True
        if self.now_s is not None:
            attempt.came_s[rank] = self.now_s
        attempt.open(rank, lambda other: attempt.sources.get(other) in self._gone)
        return number

    def note_hello(self, source_id: str, hello: Hello) -> None:
        """A source says which job it belongs to, before it opens anything."""
        jobs = frozenset((hello.job_id,)) if hello.job_id else frozenset[str]()
        self._jobs[source_id] = (jobs, hello.is_worker)

    def note_gone(self, source_id: str) -> None:
        """A source has ended; what this means for rows that wait is :meth:`end_source`'s."""
        self._gone.add(source_id)

    def open_run(self) -> None:
        """Another run begins: who has not logged in it yet takes no part in it yet."""
        for attempt in self._all():
            attempt.pace = Pace()
            attempt.joined = False

    def present(self) -> Iterator[tuple[Stage, Sequence[Attempt]]]:
        """The attempts of each stage that takes part in this run, the latest last."""
        for stage, attempts in self._attempts.items():
            if any(attempt.joined or attempt.pace.heard for attempt in attempts):
                yield stage, attempts

    def is_waiting(self, run: int) -> bool:
        """Whether rows of a stage's own run wait for other ranks."""
        return bool(self.rows) and any(
            attempt.groups
            for stage, attempts in self._attempts.items()
            if stage.run == run
            for attempt in attempts
        )

    def end_seat(self, seat: Seat) -> list[Group]:
        """A rank was closed: it is not waited for; returns what is done by it."""
        return self._finished(seat.attempt.close(seat.rank))

    def due(self, now_s: float, waiting: Waiting) -> list[Group]:
        """Groups that have waited long enough, or for which there is no more room."""
        found = self._finished(
            [group for attempt in self._all() for group in attempt.due(now_s, waiting)]
        )
        while self.rows > MAX_WAITING_ROWS:
            oldest = min((a for a in self._all() if a.groups), key=_position)
            found += self._finished(oldest.take([next(iter(oldest.groups))]))
        return found

    def flush(self) -> list[Group]:
        """Everything that waits, as it is; a run that begins after it knows no late rows."""
        found: list[Group] = []
        for attempt in self._all():
            found += attempt.take(list(attempt.groups))
            attempt.done.clear()
            attempt.rounds.clear()
        return self._finished(found)

    def position(self, otherwise: int) -> int:
        """Ledger position before which no waiting row lies, at most ``otherwise``."""
        if not self.rows:
            return otherwise
        return min((_position(a) for a in self._all() if a.groups), default=otherwise)

    def _finished(self, groups: list[Group]) -> list[Group]:
        self.rows -= sum(len(group.frames) for group in groups)
        return groups

    def _all(self) -> Iterator[Attempt]:
        for attempts in self._attempts.values():
            yield from attempts


def _position(attempt: Attempt) -> int:
    # Groups are opened in the order of the ledger, so the first one lies before the others.
    return next(iter(attempt.groups.values())).position
