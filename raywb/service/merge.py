"""From ledger entries to finished rows: the merge's state, and no I/O.

``consume`` takes an entry's bytes and returns what a batch is made of; ``due`` and ``flush`` do so
for rows that waited for other ranks. ``replay`` takes a batch that was written before a restart,
and brings the state to where it was. Between them, every frame of every source is used exactly
once: per source, what was consumed is a set of ranges, and a frame inside it is passed over.

Rows that wait are in no batch. After a restart they are found again in the ledger, which is read
from the position that the last batch named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeGuard

from raywb.errors import FrameError
from raywb.rows import (
    Alert,
    Artifact,
    Channel,
    ConfigUpdate,
    Counters,
    Define,
    End,
    EndChannel,
    Frame,
    Hello,
    Message,
    Owner,
    Row,
    Scalar,
    SummaryUpdate,
    Table,
    decode,
    scan,
)
from raywb.service.bounds import check
from raywb.service.definitions import Definitions
from raywb.service.outbox import (
    AttemptNumber,
    Batch,
    Item,
    OutAlert,
    OutArtifact,
    OutConfig,
    OutDefine,
    OutRow,
    OutSummary,
    OutTable,
    Range,
    SeriesName,
    State,
)
from raywb.service.ranks import Attempt, Group, Part, RankMerge, Seat, Stage, Waiting
from raywb.service.sources import (
    Losses,
    SeriesNames,
    Source,
    has_rank,
    stage_of,
    stage_prefix,
)
from raywb.service.stage_runs import FIRST_STAGE_RUN, StageRuns

__all__ = ["Merge"]


@dataclasses.dataclass
class _Entry:
    """The ledger entry under way, and the last row in it that waited for nobody."""

    source_id: str
    source: Source
    position: int
    now_s: float
    batch: Batch
    last: Row | None = None
    last_keys: set[str] = dataclasses.field(default_factory=set)
    last_item: int = 0


def _is_ordered(step: int | float | None) -> TypeGuard[int | float]:
    """Whether ranks can meet at this step: it is there, and a number."""
    return step is not None and step == step


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """The same bytes in as few ranges as possible."""
    joined: list[Range] = []
    for found in sorted(ranges, key=lambda r: (r.source_id, r.start)):
        last = joined[-1] if joined else None
        if last is not None and last.source_id == found.source_id and last.end == found.start:
            joined[-1] = Range(last.source_id, last.start, found.end, last.rows + found.rows)
        else:
            joined.append(found)
    return joined


class Merge:
    """Turns frames into items for the sinks; deterministic in the order of the ledger.

    Attributes:
        run: number of the run that rows belong to now.
        rows: rows received for that run, those that wait for other ranks among them.
        stages: runs that stages have of their own.
        damaged: stretches of journals that held no whole frame, and frames of no known message.
        late: rows of that run whose step had been finished without their rank.
    """

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.run = 0
        self.rows = 0
        self.damaged = 0
        self.late = 0
        self._ranks = RankMerge()
        self.stages = StageRuns()
        self._definitions = Definitions()
        self._series = SeriesNames()
        self._losses = Losses(self.sources)

    def open_run(self, run: int) -> None:
        """Rows from here on belong to ``run``: its namespaces and counters begin anew."""
        if run == self.run:
            return
        self._ranks.open_run()
        self._losses.open_run(self.damaged)
        self.run = run
        self.rows = 0
        self.late = 0
        self._definitions.open_run(run)
        self._series.open_run()

    @property
    def lost(self) -> dict[str, int]:
        """What the sources and the service could not keep since the run began, by reason."""
        return self._losses.lost(self.damaged)

    @property
    def rejected(self) -> int:
        """Values that ``log()`` refused since the run began."""
        return self._losses.rejected

    def consume(
        self,
        source_id: str,
        offset: int,
        data: bytes,
        next_position: int,
        *,
        position: int = 0,
        now_s: float = 0.0,
    ) -> Batch | None:
        """Use the frames of one ledger entry that were not used before.

        Args:
            source_id: whose journal it is.
            offset: where ``data`` begins there.
            data: the entry's bytes.
            next_position: the ledger position after the entry.
            position: the ledger position of the entry.
            now_s: the present on a monotonic clock, from which its rows wait for other ranks.

        Returns:
            The batch to be written, or None when there is nothing to write.
        """
        source = self.sources.setdefault(source_id, Source())
        start = max(source.consumed, offset)
        end = offset + len(data)
        if start >= end:
            return None
        batch = Batch(self.run, next_position)
        self._ranks.now_s = now_s
        entry = _Entry(source_id, source, position, now_s, batch)
        begin, rows = start, 0
        for found in scan(memoryview(data)[start - offset :]):
            at, after = start + found.start, start + found.end
            if source.used.covers(at):
                continue
            message = None
            if isinstance(found, Frame):
                with contextlib.suppress(FrameError):
                    decoded = decode(found.payload)
                    check(decoded)
                    message = decoded
            if message is None:
                batch.damaged += 1
            elif isinstance(message, Row):
                self._count_row(source, message.channel)
                if self._use_row(entry, message, (source_id, at, after)):
                    rows += 1
                else:
                    if begin < at:
                        batch.consumed.append(Range(source_id, begin, at, rows))
                    begin, rows = after, 0
            else:
                rows += self._use(source_id, source, message, batch)
        if begin < end:
            batch.consumed.append(Range(source_id, begin, end, rows))
        source.consumed = end
        source.used.forget_before(end)
        source.run = self.run
        self.damaged += batch.damaged
        return self._closed(batch)

    def due(self, now_s: float, waiting: Waiting, position: int) -> Batch | None:
        """The rows that have waited long enough for other ranks, as a batch to be written."""
        return self._batch_of(self._ranks.due(now_s, waiting), position)

    def flush(self, position: int) -> Batch | None:
        """All rows that wait for other ranks, since the run is about to end."""
        return self._batch_of(self._ranks.flush(), position)

    @property
    def waiting_rows(self) -> int:
        """Rows that wait for other ranks."""
        return self._ranks.rows

    @property
    def attempts(self) -> Iterable[tuple[Stage, Sequence[Attempt]]]:
        """The attempts of each stage with ranks, the latest last."""
        return self._ranks.present()

    def is_waiting(self, run: int) -> bool:
        """Whether rows of a stage's own run wait for other ranks."""
        return self._ranks.is_waiting(run)

    def position(self, otherwise: int) -> int:
        """The ledger position from which a restarted service has to read again."""
        return self._ranks.position(otherwise)

    def _batch_of(self, groups: list[Group], position: int) -> Batch | None:
        batch = Batch(self.run, position)
        self._use_groups(groups, batch)
        return self._closed(batch)

    def _closed(self, batch: Batch) -> Batch | None:
        """The batch with its ranges put together; None when it says nothing."""
        if not batch.consumed and not batch.items:
            return None
        batch.consumed = _joined(batch.consumed)
        batch.ledger_position = self._ranks.position(batch.ledger_position)
        self.late += batch.late
        return batch

    def replay(self, batch: Batch) -> None:
        """Take over what a batch on disk says, without producing anything."""
        self.open_run(batch.run)
        self.damaged += batch.damaged
        self.late += batch.late
        of_stages: Counter[int] = Counter()
        for item in batch.items:
            if isinstance(item, OutDefine):
                self._definitions_of(item.run).note(item)
            elif isinstance(item, OutRow) and item.run >= FIRST_STAGE_RUN:
                of_stages[item.run] += item.logged
        self.stages.rows += of_stages
        self.rows -= of_stages.total()
        for source_id, message in batch.state:
            self._note(source_id, self.sources.setdefault(source_id, Source()), message)
        for consumed in batch.consumed:
            source = self.sources.setdefault(consumed.source_id, Source())
            source.used.add(consumed.start, consumed.end)
            source.run = batch.run
            source.rows += consumed.rows
            self.rows += consumed.rows

    def recall(self, source_id: str, data: bytes) -> None:
        """Take over who a source is, and what its channels are, from bytes that were consumed."""
        source = self.sources.setdefault(source_id, Source())
        for found in scan(data):
            with contextlib.suppress(FrameError):  # counted when they were consumed
                message = decode(found.payload) if isinstance(found, Frame) else None
                if isinstance(message, (Hello, Channel, Counters, End, EndChannel)):
                    check(message)
                    self._note(source_id, source, message)
                    if isinstance(message, Channel) and has_rank(message):
                        rank, world_size = message.rank or 0, message.world_size or 1
                        self._ranks.open_seat(stage_of(message), source_id, rank, world_size)

    def _use(self, source_id: str, source: Source, message: Message, batch: Batch) -> int:
        """Make items of a message that is no plain row; returns how many rows it is."""
        match message:
            case Table():
                # Also one of a rank: what several say in tables cannot be made into one.
                self._count_row(source, message.channel)
                run = self._run_of(source, message.channel)
                prefix = self._prefix(source_id, source, message.channel, batch)
                table = OutTable(prefix + message.name, message.columns, message.rows)
                batch.items.append(OutRow(run, message.time_s, {}, table=table))
                return 1
            case Artifact():
                run = self._run_of(source, message.channel)
                name, kind, files = message.name, message.kind, message.files
                batch.items.append(OutArtifact(run, name, kind, files))
            case Alert():
                run = self._run_of(source, message.channel)
                batch.items.append(OutAlert(run, message.title, message.text, message.level))
            case _:
                self._use_plain(source_id, source, message, batch)
        return 0

    def _use_plain(self, source_id: str, source: Source, message: Message, batch: Batch) -> None:
        match message:
            case ConfigUpdate():
                run = self._run_of(source, message.channel)
                batch.items.append(OutConfig(run, message.values))
            case SummaryUpdate():
                run = self._run_of(source, message.channel)
                prefix = self._prefix(source_id, source, message.channel, batch)
                values = {prefix + key: value for key, value in message.values.items()}
                batch.items.append(OutSummary(run, values))
            case Define():
                prefix = self._prefix(source_id, source, message.channel, batch)
                name = prefix + message.name
                axis = message.step_metric and prefix + message.step_metric
                if message.step_metric or message.summary or message.across_ranks is None:
                    run = self._run_of(source, message.channel)
                    item = OutDefine(run, name, axis, message.summary)
                    self._definitions_of(run).note(item)
                    batch.items.append(item)
                if message.across_ranks is not None:
                    self._note(source_id, source, message)
                    batch.state.append((source_id, message))
            case _:
                self._use_state(source_id, source, message, batch)

    def _use_state(self, source_id: str, source: Source, message: State, batch: Batch) -> None:
        """Take over, and write down, what a source says of itself or of a channel."""
        match message:
            case End():
                self._note(source_id, source, message)
                batch.state.append((source_id, message))
                self._use_groups(self._ranks.end_source(source_id), batch)
            case EndChannel():
                batch.state.append((source_id, message))
                self._use_groups(self._note_end_channel(source_id, source, message), batch)
            case Hello() | Channel() | Counters() | Owner():
                self._note(source_id, source, message)
                batch.state.append((source_id, message))
                if isinstance(message, Channel) and has_rank(message):
                    rank, world_size = message.rank or 0, message.world_size or 1
                    stage = stage_of(message)
                    number = self._ranks.open_seat(stage, source_id, rank, world_size)
                    batch.state.append((source_id, AttemptNumber(message.channel, number)))

    def _note(self, source_id: str, source: Source, message: State) -> None:
        """Take over what a source says of itself."""
        match message:
            case Hello():
                source.hello = message
                self._ranks.note_hello(source_id, message)
            case Counters():
                self._losses.note(source, message)
            case End():
                self.stages.note_end(source_id, message)
                self._ranks.note_gone(source_id)
                source.ended = True
                # Its own word counts, also when rows of an exit handler came behind it.
                if source.end is None or source.end.killed:
                    source.end = message
            case Owner():
                source.owner = message
            case _:
                self._note_channel(source_id, source, message)

    def _note_channel(self, source_id: str, source: Source, message: State) -> None:
        """Take over what a source says of one of its channels."""
        match message:
            case Channel():
                source.channels[message.channel] = message
                source.seats.pop(message.channel, None)
                source.closed.discard(message.channel)
                self.stages.note_channel(source_id, message)
            case EndChannel():
                # Of a batch that is taken over: no rows wait then.
                self._note_end_channel(source_id, source, message)
            case AttemptNumber():
                channel = source.channels[message.channel]
                stage, number = stage_of(channel), message.number
                rank, world_size = channel.rank or 0, channel.world_size or 1
                self._ranks.assign(stage, source_id, rank, world_size, number)
                self._ranks.open_seat(stage, source_id, rank, world_size)
            case Define():
                of = source.channels.get(message.channel)
                name = stage_prefix(of) + message.name
                definitions = self._definitions_of(self.stages.run_of(of))
                definitions.set_across_ranks(name, message.across_ranks or "mean")
            case SeriesName():
                self._series.note(source_id, message)

    def _note_end_channel(self, source_id: str, source: Source, message: EndChannel) -> list[Group]:
        """A client was closed; returns what is done by it, when it was the last of its rank."""
        self.stages.note_end_channel(source_id, message)
        source.closed.add(message.channel)
        channel = source.channels.get(message.channel)
        if channel is None or not has_rank(channel):
            return []
        place = (stage_of(channel), channel.rank, channel.world_size)
        for number, other in source.channels.items():
            same = (stage_of(other), other.rank, other.world_size) == place
            if same and number not in source.closed:
                return []
        return self._ranks.end_seat(self._take_seat(source_id, source, channel))

    def _use_row(self, entry: _Entry, row: Row, frame: tuple[str, int, int]) -> bool:
        """Make an item of a row; False when it waits for other ranks instead."""
        source, batch = entry.source, entry.batch
        channel = source.channels.get(row.channel)
        time_s, values = row.time_s, row.metrics
        if "_timestamp" in values:
            values = dict(values)
            stamp = values.pop("_timestamp")
            if not isinstance(stamp, str) and math.isfinite(stamp):
                time_s = float(stamp)
        seat = source.seats.get(row.channel)
        if seat is None and channel is not None and has_rank(channel):
            seat = self._take_seat(entry.source_id, source, channel)
        if seat is not None and _is_ordered(row.step):
            part = Part(seat.rank, time_s, values)
            groups = self._ranks.add(seat, row.step, part, frame, entry.position, entry.now_s)
            if groups:
                self._use_groups(groups, batch)
            return False
        source.alone_s = entry.now_s
        prefix = self._prefix(entry.source_id, source, row.channel, batch)
        metrics: dict[str, Scalar] = {prefix + key: value for key, value in values.items()}
        run = self.stages.run_of(channel)
        last, entry.last = entry.last, row
        if (
            last is not None
            and row.step is not None
            and (last.channel, last.step) == (row.channel, row.step)
            and values.keys().isdisjoint(entry.last_keys)
        ):
            entry.last_keys |= values.keys()
            self._put_axes(batch.items, channel, prefix, metrics, row.step)
            before = batch.items[entry.last_item]
            if isinstance(before, OutRow):
                metrics = before.metrics | metrics
                joined = OutRow(run or self.run, time_s, metrics, before.logged + 1)
                # Definitions of the new keys go before the row.
                del batch.items[entry.last_item]
                batch.items.append(joined)
        else:
            entry.last_keys = set(values)
            self._put_axes(batch.items, channel, prefix, metrics, row.step)
            batch.items.append(OutRow(run or self.run, time_s, metrics))
        entry.last_item = len(batch.items) - 1
        return True

    def _put_axes(
        self,
        items: list[Item],
        channel: Channel | None,
        prefix: str,
        metrics: dict[str, Scalar],
        step: int | float | None,
    ) -> None:
        """Define the row's axis, and put its step among the values."""
        definitions = self._definitions_of(self.stages.run_of(channel))
        if channel is not None and channel.axis is not None:
            definitions.define_axis(items, prefix, prefix + channel.axis, metrics)
        elif step is not None:
            definitions.put_steps(items, prefix, metrics, step)

    def _count_row(self, source: Source, channel: int) -> None:
        source.rows += 1
        if run := self.stages.run_of(source.channels.get(channel)):
            self.stages.rows[run] += 1
        else:
            self.rows += 1

    def _run_of(self, source: Source, channel: int) -> int:
        """The run that a channel's messages belong to."""
        return self.stages.run_of(source.channels.get(channel)) or self.run

    def _definitions_of(self, run: int) -> Definitions:
        return self.stages.definitions(run) if run >= FIRST_STAGE_RUN else self._definitions

    def _take_seat(self, source_id: str, source: Source, channel: Channel) -> Seat:
        """Where a channel's rows meet those of other ranks; decided when it was opened."""
        rank, world_size = channel.rank or 0, channel.world_size or 1
        seat = self._ranks.seat(stage_of(channel), source_id, rank, world_size)
        source.seats[channel.channel] = seat
        return seat

    def _use_groups(self, groups: list[Group], batch: Batch) -> None:
        """One row for each group, and the ranges of those that it was made of."""
        for group in groups:
            prefix, run = group.prefix, group.run if group.run in self.stages.known else 0
            definitions = self._definitions_of(run)
            merged = group.metrics(definitions.across_ranks)
            metrics = {prefix + key: value for key, value in merged.items()}
            definitions.put_steps(batch.items, prefix, metrics, group.step)
            batch.items.append(OutRow(run or self.run, group.time_s, metrics, len(group.frames)))
            batch.consumed += [Range(*frame, 1) for frame in group.frames]
            if group.late and not run:
                batch.late += len(group.frames)

    def _prefix(self, source_id: str, source: Source, number: int, batch: Batch) -> str:
        """What stands before the keys of a channel: nothing, or its name and a slash."""
        channel = source.channels.get(number)
        if channel is None or channel.label is None or channel.stage is None or channel.run:
            return stage_prefix(channel)
        name = self._series.name_of(source_id, number)
        if name is None:
            series = self._series.choose(number, channel.stage, channel.label)
            self._note(source_id, source, series)
            batch.state.append((source_id, series))
            name = series.name
        return name + "/"
