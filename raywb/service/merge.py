"""From ledger entries to finished rows: the merge's state, and no I/O.

``consume`` takes an entry's bytes and returns what a batch is made of. ``replay`` takes a batch
that was written before a restart, and brings the state to where it was. Between the two, every
frame of every source is used exactly once: per source, what was consumed is a set of ranges, and
a frame inside it is passed over.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from raywb.errors import FrameError
from raywb.rows import (
    Alert,
    Artifact,
    Channel,
    ConfigUpdate,
    Counters,
    Define,
    End,
    Frame,
    Hello,
    Message,
    Row,
    Scalar,
    SummaryUpdate,
    Table,
    decode,
    is_digest,
    is_plain_path,
    scan,
)
from raywb.service.outbox import (
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
)

__all__ = ["Merge", "Source"]


@dataclasses.dataclass
class Source:
    """What is known of one process that logs."""

    hello: Hello | None = None
    channels: dict[int, Channel] = dataclasses.field(default_factory=dict)
    counters: Counters = dataclasses.field(default_factory=lambda: Counters(0, {}))
    rows: int = 0
    consumed: int = 0
    ended: bool = False


class Merge:
    """Turns frames into items for the sinks; deterministic in the order of the ledger.

    Attributes:
        run: number of the run that rows belong to now.
        rows: rows consumed for that run.
        damaged: stretches of journals that held no whole frame, and frames of no known message.
    """

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.run = 0
        self.rows = 0
        self.damaged = 0
        self._defined: set[str] = set()
        self._axes: dict[str, str] = {}
        self._nested: set[str] = set()
        self._series: dict[tuple[str, int], str] = {}
        self._series_count: Counter[str] = Counter()
        self._lost_before: Counter[str] = Counter()
        self._rejected_before = 0

    def open_run(self, run: int) -> None:
        """Rows from here on belong to ``run``: its namespaces and counters begin anew."""
        if run == self.run:
            return
        self._lost_before = self._all_lost()
        self._rejected_before = self._all_rejected()
        self.run = run
        self.rows = 0
        self._defined.clear()
        self._axes.clear()
        self._nested.clear()
        self._series.clear()
        self._series_count.clear()

    def has_ended(self, source_id: str) -> bool:
        """Whether a source has said that it ends."""
        source = self.sources.get(source_id)
        return source is not None and source.ended

    @property
    def lost(self) -> dict[str, int]:
        """What the sources and the service could not keep since the run began, by reason."""
        return dict(self._all_lost() - self._lost_before)

    @property
    def rejected(self) -> int:
        """Values that ``log()`` refused since the run began."""
        return self._all_rejected() - self._rejected_before

    def _all_lost(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for source in self.sources.values():
            total.update(source.counters.lost)
        if self.damaged:
            total["damaged_frames"] += self.damaged
        return total

    def _all_rejected(self) -> int:
        return sum(source.counters.rejected for source in self.sources.values())

    def consume(self, source_id: str, offset: int, data: bytes, next_position: int) -> Batch | None:
        """Use the frames of one ledger entry that were not used before.

        Args:
            source_id: whose journal it is.
            offset: where ``data`` begins there.
            data: the entry's bytes.
            next_position: the ledger position after the entry.

        Returns:
            The batch to be written, or None when nothing in the entry is new.
        """
        source = self.sources.setdefault(source_id, Source())
        start = max(source.consumed, offset)
        end = offset + len(data)
        if start >= end:
            return None
        batch = Batch(self.run, next_position)
        rows_before = source.rows
        for found in scan(memoryview(data)[start - offset :]):
            if not isinstance(found, Frame):
                batch.damaged += 1
                continue
            try:
                message = decode(found.payload)
            except FrameError:
                batch.damaged += 1
                continue
            self._use(source_id, source, message, batch)
        rows = source.rows - rows_before
        batch.consumed.append(Range(source_id, start, end, rows))
        source.consumed = end
        self.rows += rows
        self.damaged += batch.damaged
        return batch

    def replay(self, batch: Batch) -> None:
        """Take over what a batch on disk says, without producing anything."""
        self.open_run(batch.run)
        self.damaged += batch.damaged
        for item in batch.items:
            if isinstance(item, OutDefine):
                self._defined.add(item.name)
                if item.name.endswith("/*") and item.step_metric and item.step_sync is False:
                    self._remember_axis(item.name[:-1], item.step_metric)
        for source_id, message in batch.state:
            self._note(source_id, self.sources.setdefault(source_id, Source()), message)
        for consumed in batch.consumed:
            source = self.sources.setdefault(consumed.source_id, Source())
            source.consumed = max(source.consumed, consumed.end)
            source.rows += consumed.rows
            self.rows += consumed.rows

    def _use(self, source_id: str, source: Source, message: Message, batch: Batch) -> None:
        match message:
            case Row():
                source.rows += 1
                self._use_row(source_id, source, message, batch)
            case ConfigUpdate():
                batch.items.append(OutConfig(self.run, message.values))
            case SummaryUpdate():
                prefix = self._prefix(source_id, source, message.channel, batch)
                values = {prefix + key: value for key, value in message.values.items()}
                batch.items.append(OutSummary(self.run, values))
            case Define():
                prefix = self._prefix(source_id, source, message.channel, batch)
                name = prefix + message.name
                axis = message.step_metric and prefix + message.step_metric
                self._defined.add(name)
                batch.items.append(OutDefine(self.run, name, axis, message.summary))
            case Table():
                source.rows += 1
                prefix = self._prefix(source_id, source, message.channel, batch)
                table = OutTable(prefix + message.name, message.columns, message.rows)
                batch.items.append(OutRow(self.run, message.time_s, {}, table))
            case Artifact():
                # The digests become names of files here, the paths wherever it is downloaded.
                if all(
                    is_digest(file.digest) and is_plain_path(file.path) for file in message.files
                ):
                    name, kind, files = message.name, message.kind, message.files
                    batch.items.append(OutArtifact(self.run, name, kind, files))
                else:
                    batch.damaged += 1
            case Alert():
                batch.items.append(OutAlert(self.run, message.title, message.text, message.level))
            case Hello() | Channel() | Counters() | End():
                self._note(source_id, source, message)
                batch.state.append((source_id, message))

    def _note(self, source_id: str, source: Source, message: Message | SeriesName) -> None:
        match message:
            case SeriesName():
                self._series[source_id, message.channel] = message.name
                self._series_count[message.namespace] += 1
            case Hello():
                source.hello = message
            case Channel():
                source.channels[message.channel] = message
            case Counters():
                source.counters = message
            case End():
                source.ended = True

    def _use_row(self, source_id: str, source: Source, row: Row, batch: Batch) -> None:
        items = batch.items
        channel = source.channels.get(row.channel)
        prefix = self._prefix(source_id, source, row.channel, batch)
        metrics: dict[str, Scalar] = {prefix + key: value for key, value in row.metrics.items()}
        time_s = row.time_s
        stamp = metrics.pop(prefix + "_timestamp", None)
        if isinstance(stamp, (int, float)):
            time_s = float(stamp)
        if channel is not None and channel.axis is not None:
            self._define_axis(items, prefix, prefix + channel.axis, metrics)
        elif row.step is not None:
            self._put_steps(items, prefix, metrics, row.step)
        items.append(OutRow(self.run, time_s, metrics))

    def _put_steps(
        self, items: list[Item], prefix: str, metrics: dict[str, Scalar], step: int | float
    ) -> None:
        """Add the step as data, on the axis of the stage, or of each key's own namespace."""
        if prefix:
            metrics[prefix + "step"] = step
            self._define_axis(items, prefix, prefix + "step", metrics)
            return
        for key in list(metrics):
            namespace = key.rpartition("/")[0]
            axis = f"{namespace}/step" if namespace else "step"
            if key == axis:
                continue
            if namespace:
                self._define_axis(items, namespace + "/", axis, (key,))
            else:
                self._define(items, axis)
                self._define(items, key, axis)
            metrics.setdefault(axis, step)

    def _define_axis(self, items: list[Item], prefix: str, axis: str, keys: Iterable[str]) -> None:
        """Define a namespace's axis on first sight.

        ``a/*`` also matches the keys of ``a/b/``. W&B does not say which of two globs counts, so
        the keys of a namespace that lies within another one are defined by their full names.
        """
        self._remember_axis(prefix, axis)
        self._define(items, axis)
        self._define(items, prefix + "*", axis)
        if prefix in self._nested:
            for key in keys:
                if key != axis:
                    self._define(items, key, axis)

    def _remember_axis(self, prefix: str, axis: str) -> None:
        if prefix not in self._axes:
            self._axes[prefix] = axis
            self._nested = {
                inner
                for inner in self._axes
                if any(inner != outer and inner.startswith(outer) for outer in self._axes)
            }

    def _define(self, items: list[Item], name: str, axis: str | None = None) -> None:
        """Define a name of ours once in a run, unless the user has defined it."""
        if name not in self._defined:
            self._defined.add(name)
            items.append(OutDefine(self.run, name, axis, None, None if axis is None else False))

    def _prefix(self, source_id: str, source: Source, number: int, batch: Batch) -> str:
        """What stands before the keys of a channel: nothing, or its name and a slash."""
        channel = source.channels.get(number)
        if channel is None or channel.stage is None:
            return ""
        if channel.label is None:
            return channel.stage + "/"
        if (source_id, number) not in self._series:
            count = self._series_count[channel.stage] + 1
            name = channel.stage if count == 1 else f"{channel.stage}/{channel.label}_{count}"
            series = SeriesName(number, channel.stage, name)
            self._note(source_id, source, series)
            batch.state.append((source_id, series))
        return self._series[source_id, number] + "/"
