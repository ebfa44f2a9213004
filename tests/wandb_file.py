"""Read what the real W&B client wrote on disk: `.wandb` transaction logs, without the client.

A file is seven bytes of header, then a LevelDB log: blocks of 32 KiB holding fragments (the
zlib CRC32 of kind and body, length, kind), which join into `wandb_internal_pb2.Record` messages.
wandb-core writes a block when it is full, else every 15 seconds, so the file of a killed run
ends anywhere: such a tail is *torn*, which is normal, and never counted as damage.

    run = read_run(path)             # one file
    runs = read_runs(directory)      # every run below a directory, its segments joined in order

How values come back: rows of `history` are flat, a nested value's path joined with dots as W&B
shows it (`{"a": {"b": 1}}` → `a.b`; a slash in a key is only a character). `config` and `summary`
stay nested, as W&B's server stores them (a metric defined with `summary="max"` is
`{"loss": {"max": 3}}`). W&B's own `_wandb` entries are left out of both.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2 as pb

#: What every file of this format begins with.
HEADER = b":W&B"
#: Length in bytes of the header, which also holds a magic number and a version.
HEADER_SIZE = 7
#: Length in bytes of a block; no fragment crosses the border of one.
BLOCK_SIZE = 32 * 1024
#: CRC, length and kind of a fragment.
FRAGMENT = struct.Struct("<IHB")

#: What keys of raywb's own rows on nodes begin with.
NODE_KEYS = ("nodes/", "raywb/nodes")

FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

#: `offline-run-20261121_230358-r1` and `run-20261121_230358-r1`: the second in which it began.
RUN_DIRECTORY = re.compile(r"(?:offline-)?run-(?P<started>\d{8}_\d{6})-(?P<run_id>.+)")


@dataclass(frozen=True)
class MetricDefinition:
    """What `run.define_metric` said of one name or glob."""

    step_metric: str | None = None
    summary: frozenset[str] = frozenset()
    hidden: bool = False


@dataclass(frozen=True)
class LoggedArtifact:
    """An artifact version that the run asked W&B to keep."""

    name: str
    type: str
    digest: str
    aliases: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


@dataclass
class WandbRun:
    """All that the files of one run id say, folded in the order in which it was written."""

    run_id: str = ""
    project: str = ""
    entity: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    notes: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    #: Rows in the order of the file; each has `_step` and what else W&B added (`_timestamp`, …).
    history: list[dict[str, Any]] = field(default_factory=list)
    #: By name, or by glob for a definition such as `train/*`.
    metrics: dict[str, MetricDefinition] = field(default_factory=dict)
    artifacts: list[LoggedArtifact] = field(default_factory=list)
    #: Title and text of each alert.
    alerts: list[tuple[str, str]] = field(default_factory=list)
    #: None where the (last) file has no exit record: the process was killed, or still runs.
    exit_code: int | None = None
    segments: list[Path] = field(default_factory=list)
    #: Records that were whole on disk and yet unreadable: a wrong CRC, kind or message.
    damaged: int = 0
    #: Files that end in the middle of a record, as those of killed runs do.
    torn: int = 0
    #: W&B's clock at the start of the (first) segment, in seconds.
    started_at: float = 0.0

    def values(self, key: str) -> list[Any]:
        """The values of one key, in the order of the rows that have it."""
        return [row[key] for row in self.history if key in row]

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The rows that somebody logged: all but those that raywb adds on the cluster's nodes."""
        return [row for row in self.history if not any(key.startswith(NODE_KEYS) for key in row)]

    @property
    def steps(self) -> list[int]:
        """W&B's step of each row, in the order of the file."""
        return [row["_step"] for row in self.history]


def read_run(path: Path | str) -> WandbRun:
    """Read one `.wandb` file, which may still be growing.

    Raises:
        ValueError: The file is not a W&B transaction log.
    """
    path = Path(path)
    data = path.read_bytes()
    run = WandbRun(segments=[path])
    if len(data) < HEADER_SIZE and HEADER.startswith(data[: len(HEADER)]):
        run.torn = 1
    elif not data.startswith(HEADER):
        raise ValueError(f"{path} is not a W&B transaction log: it begins with {data[:8]!r}")
    for payload in _payloads(data, run):
        try:
            _fold(run, pb.Record.FromString(payload))
        except (DecodeError, ValueError):  # ValueError: a value that is not JSON
            run.damaged += 1
    run.run_id = run.run_id or path.stem.removeprefix("run-")
    return run


def read_runs(directory: Path | str) -> dict[str, WandbRun]:
    """Read every run below a directory, the segments of one run id joined in order of start."""
    paths = {
        path
        for path in Path(directory).rglob("*.wandb")
        if path.is_file() and RUN_DIRECTORY.fullmatch(path.parent.name)
    }
    # W&B keeps a link `latest-run` beside the directories; its target has been found already.
    segments = [read_run(path) for path in {path.resolve() for path in paths}]
    runs: dict[str, WandbRun] = {}
    for segment in sorted(segments, key=_start_order):
        known = runs.get(segment.run_id)
        runs[segment.run_id] = segment if known is None else _join(known, segment)
    return runs


def _start_order(run: WandbRun) -> tuple[str, float, str]:
    path = run.segments[0]
    match = RUN_DIRECTORY.fullmatch(path.parent.name)
    return (match["started"] if match else "", run.started_at, str(path))


def _join(run: WandbRun, later: WandbRun) -> WandbRun:
    """The run that W&B has after it was sent `run`, then `later`."""
    for key, value in later.summary.items():
        _merge(run.summary, key, value)
    return replace(
        run,
        **{
            name: getattr(later, name) or getattr(run, name)
            for name in ("project", "entity", "group", "job_type", "name", "notes", "tags")
        },
        config=run.config | later.config,
        history=run.history + later.history,
        metrics=run.metrics | later.metrics,
        artifacts=run.artifacts + later.artifacts,
        alerts=run.alerts + later.alerts,
        exit_code=later.exit_code,
        segments=run.segments + later.segments,
        damaged=run.damaged + later.damaged,
        torn=run.torn + later.torn,
    )


# ----------------------------------------------------------------------------------------------
# The log: bytes to payloads


def _payloads(data: bytes, run: WandbRun) -> Iterator[bytes]:
    """Yield each whole payload, counting in `run` the damaged ones, and a torn tail."""
    parts: list[bytes] = []
    for kind, body in _fragments(data, run):
        if kind in (FULL, FIRST):
            run.damaged += bool(parts)  # its end never came
            parts = [body]
        elif kind and parts:
            parts.append(body)
        else:
            parts = []  # damaged here, or the rest of what was: either way counted once
        if kind in (FULL, LAST) and parts:
            yield b"".join(parts)
            parts = []
    if parts:
        run.torn = 1


def _fragments(data: bytes, run: WandbRun) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and body of each fragment; kind 0 stands for a damaged one."""
    position = HEADER_SIZE
    while position < len(data):
        room = BLOCK_SIZE - position % BLOCK_SIZE
        if room < FRAGMENT.size:  # too small for a fragment: filled with zeros
            position += room
            continue
        if len(data) - position < FRAGMENT.size:
            run.torn = 1
            return
        crc, length, kind = FRAGMENT.unpack_from(data, position)
        begin, end = position + FRAGMENT.size, position + FRAGMENT.size + length
        believable = FULL <= kind <= LAST and end <= position + room
        if believable and end > len(data):
            run.torn = 1
            return
        if believable and crc == zlib.crc32(data[begin - 1 : end]):
            yield kind, data[begin:end]
        else:
            run.damaged += 1
            yield 0, b""
        # A length that cannot be believed says nothing: read on at the next border.
        position = end if believable else position + room


# ----------------------------------------------------------------------------------------------
# The records: payloads to a run


def _fold(run: WandbRun, record: pb.Record) -> None:
    """Apply one record to the run as W&B's server would; kinds that hold no data pass by."""
    kind = record.WhichOneof("record_type")
    if kind == "history":
        run.history.append(_row(record.history))
    elif kind == "summary":
        _apply(run.summary, record.summary)
    elif kind == "config":
        _apply(run.config, record.config)
    elif kind == "run":
        _fold_run(run, record.run)
    elif kind == "metric":
        _define(run.metrics, record.metric)
    elif kind == "artifact":
        run.artifacts.append(_artifact(record.artifact))
    elif kind == "alert":
        run.alerts.append((record.alert.title, record.alert.text))
    elif kind == "exit":
        run.exit_code = record.exit.exit_code


def _row(history: pb.HistoryRecord) -> dict[str, Any]:
    row = {".".join(_path(item)): json.loads(item.value_json) for item in history.item}
    row.setdefault("_step", history.step.num)
    return row


def _path(item: Any) -> list[str]:
    return list(item.nested_key) or [item.key]


def _apply(target: dict[str, Any], change: pb.SummaryRecord | pb.ConfigRecord) -> None:
    for item in change.update:
        *parents, key = _path(item)
        if (parents or [key])[0] == "_wandb":
            continue
        place = target
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[key] = json.loads(item.value_json)
    for item in change.remove:
        _remove(target, _path(item))


def _remove(target: dict[str, Any], path: Iterable[str]) -> None:
    *parents, key = path
    for parent in parents:
        target = target.get(parent, {})
    target.pop(key, None)


def _merge(target: dict[str, Any], key: str, value: Any) -> None:
    """Put a value in place; dictionaries on both sides are merged, key by key."""
    known = target.get(key)
    if isinstance(known, dict) and isinstance(value, dict):
        for inner, deeper in value.items():
            _merge(known, inner, deeper)
    else:
        target[key] = value


def _fold_run(run: WandbRun, record: pb.RunRecord) -> None:
    run.run_id = record.run_id
    run.project, run.entity = record.project, record.entity
    run.group, run.job_type = record.run_group, record.job_type
    run.name, run.notes, run.tags = record.display_name, record.notes, tuple(record.tags)
    run.started_at = run.started_at or record.start_time.ToMicroseconds() / 1e6
    _apply(run.config, record.config)
    _apply(run.summary, record.summary)


def _define(metrics: dict[str, MetricDefinition], record: pb.MetricRecord) -> None:
    if record.expanded_from_glob:  # W&B's own note of what a glob matched
        return
    name = record.glob_name or record.name
    known = (
        MetricDefinition() if record._control.overwrite else metrics.get(name, MetricDefinition())
    )
    asked = {option.name for option, value in record.summary.ListFields() if value}
    metrics[name] = MetricDefinition(
        step_metric=record.step_metric or known.step_metric,
        summary=known.summary | asked,
        hidden=record.options.hidden or known.hidden,
    )


def _artifact(record: pb.ArtifactRecord) -> LoggedArtifact:
    return LoggedArtifact(
        name=record.name,
        type=record.type,
        digest=record.digest,
        aliases=tuple(record.aliases),
        paths=tuple(entry.path for entry in record.manifest.contents),
    )
