"""What the merge knows of the processes that log: who they are, their channels, what they lost."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from raywb.rows import Channel, Counters, End, Hello, Owner
from raywb.service.bounds import MAX_REASONS
from raywb.service.outbox import SeriesName
from raywb.service.ranges import Ranges
from raywb.service.ranks import Seat, Stage

__all__ = ["Losses", "SeriesNames", "Source", "has_rank", "stage_of", "stage_prefix"]

#: Most ranks of one stage that are merged.
MAX_WORLD_SIZE = 1_000_000


@dataclasses.dataclass
class Source:
    """What is known of one process that logs.

    Attributes:
        seats: of those channels whose rows meet those of other ranks.
        closed: channels whose clients were closed.
        consumed: everything before it was seen since the service's start; ``used`` holds what
            was used before that.
        run: the last run for which something of it was consumed.
        alone_s: when its last row came that met those of no other rank.
    """

    hello: Hello | None = None
    channels: dict[int, Channel] = dataclasses.field(default_factory=dict)
    seats: dict[int, Seat] = dataclasses.field(default_factory=dict)
    closed: set[int] = dataclasses.field(default_factory=set)
    counters: Counters = dataclasses.field(default_factory=lambda: Counters(0, {}))
    rows: int = 0
    consumed: int = 0
    used: Ranges = dataclasses.field(default_factory=Ranges)
    run: int = 0
    ended: bool = False
    end: End | None = None
    alone_s: float = -math.inf
    owner: Owner | None = None


def has_rank(channel: Channel) -> bool:
    """Whether rows of this channel meet those of other ranks; senseless numbers do not."""
    rank, world_size = channel.rank, channel.world_size
    return rank is not None and world_size is not None and 0 <= rank < world_size <= MAX_WORLD_SIZE


def stage_prefix(channel: Channel | None) -> str:
    """What stands before the keys of a channel that is no series; nothing in a stage's own run."""
    if channel is None or channel.stage is None or channel.run:
        return ""
    return channel.stage + "/"


def stage_of(channel: Channel) -> Stage:
    """The stage in which a channel's rows meet those of other ranks."""
    return Stage(channel.run, stage_prefix(channel))


class Losses:
    """What sources could not keep, and what ``log()`` refused, since the run began.

    Sources count over their whole life, so a run's share is what has come since it began.

    Args:
        sources: all of them, by id; shared with the merge.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._lost_before: Counter[str] = Counter()
        self._rejected_before = 0
        self._reasons: set[str] = set()

    def open_run(self, damaged: int) -> None:
        """What was counted so far belongs to earlier runs."""
        self._lost_before = self._all_lost(damaged)
        self._rejected_before = self._all_rejected()

    def note(self, source: Source, counters: Counters) -> None:
        """Take over a source's running totals.

        They may come by two ways: of two, the higher one is the later.
        """
        lost: Counter[str] = Counter()
        for reason, count in counters.lost.items():
            # Reasons beyond those that are told apart become one.
            if len(self._reasons) < MAX_REASONS:
                self._reasons.add(reason)
            lost[reason if reason in self._reasons else "other"] += count
        known = source.counters
        highest = {
            reason: max(known.lost.get(reason, 0), lost[reason]) for reason in known.lost | lost
        }
        source.counters = Counters(max(known.rejected, counters.rejected), highest)

    def lost(self, damaged: int) -> dict[str, int]:
        """Rows that could not be kept, by reason.

        Args:
            damaged: stretches of journals that held no whole frame, since the service was made.
        """
        return dict(self._all_lost(damaged) - self._lost_before)

    @property
    def rejected(self) -> int:
        """Values that were refused."""
        return self._all_rejected() - self._rejected_before

    def _all_lost(self, damaged: int) -> Counter[str]:
        total: Counter[str] = Counter()
        for source in self._sources.values():
            total.update(source.counters.lost)
        if damaged:
            total["damaged_frames"] += damaged
        return total

    def _all_rejected(self) -> int:
        return sum(source.counters.rejected for source in self._sources.values())


class SeriesNames:
    """The names of series: the first of a namespace has its name, further ones their own."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, int], str] = {}
        self._count: Counter[str] = Counter()

    def open_run(self) -> None:
        """A new run counts from one again."""
        self._names.clear()
        self._count.clear()

    def name_of(self, source_id: str, channel: int) -> str | None:
        """The name that a source's channel got; None when it has none yet."""
        return self._names.get((source_id, channel))

    def choose(self, channel: int, namespace: str, label: str) -> SeriesName:
        """A name for one more series; it counts once it is noted."""
        count = self._count[namespace] + 1
        name = namespace if count == 1 else f"{namespace}/{label}_{count}"
        return SeriesName(channel, namespace, name)

    def note(self, source_id: str, series: SeriesName) -> None:
        """A source's channel has this name."""
        self._names[source_id, series.channel] = series.name
        self._count[series.namespace] += 1
