"""What travels from a worker to the service: typed messages, packed into frames.

A message is a msgpack array whose first element is its tag. A frame is ten bytes of header and
one message: a two-byte mark, the message's length and its checksum (little endian). The bytes of a
journal, of a request to the service and of a ledger entry are the same frames, so nothing is
encoded twice on its way.

Keys of a row are relative to the stage of its channel; the service puts the prefix on.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from raywb.errors import FrameError

__all__ = [
    "ACROSS_RANKS",
    "HEADER",
    "MAX_ARTIFACT_BYTES",
    "MAX_MESSAGE_BYTES",
    "PROTOCOL",
    "ROW_TAG",
    "TABLE_TAG",
    "Alert",
    "Artifact",
    "ArtifactFile",
    "Cell",
    "Channel",
    "ConfigUpdate",
    "Counters",
    "Define",
    "End",
    "Frame",
    "Hello",
    "Message",
    "Owner",
    "Row",
    "Scalar",
    "SummaryUpdate",
    "Table",
    "checksum",
    "cut_behind_damage",
    "decode",
    "encode",
    "end_of_source",
    "first_frame_is_whole",
    "frame",
    "holds_later_frame",
    "is_digest",
    "is_plain_path",
    "last_whole_frame",
    "scan",
]

#: Version of the messages and of the HTTP interface; client and service must agree on it.
PROTOCOL = 1

#: Longest message that is accepted; a row beyond it is the caller's mistake.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024

#: Largest artifact, all its files together.
MAX_ARTIFACT_BYTES = 16 * 1024 * 1024 * 1024

MARK = 0x5752
HEADER = struct.Struct("<HII")

#: The checksum of a message. Adler-32 takes 0.1 µs for a row where CRC-32 takes 0.2; it finds
#: every change of one or two bytes, and misses a few in 10⁸ of the others.
checksum = zlib.adler32

#: How many bytes may be check-summed in search of the next whole frame after damage. It bounds
#: the work that a hostile or badly damaged batch can cause.
RESYNC_BUDGET_BYTES = 16 * 1024 * 1024

Scalar = float | int | bool | str

#: How the values of several ranks at one step become one; ``last`` is the one logged last, and
#: ``per_rank`` keeps each as ``<key>/rank_<rank>``.
ACROSS_RANKS = ("mean", "min", "max", "sum", "last", "per_rank")
#: A value in a table; None where there is none.
Cell = Scalar | None

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether this is a SHA-256 as 64 hex digits, and nothing else."""
    return _DIGEST.fullmatch(text) is not None


def is_plain_path(path: str) -> bool:
    """Whether a path stays in its directory wherever it is laid out: relative, without tricks."""
    return (
        0 < len(path) <= 1024
        and path.isprintable()
        and "\\" not in path
        and all(part not in ("", ".", "..") for part in path.split("/"))
    )


class Hello(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """First frame of a source: which process of which cluster writes here.

    Attributes:
        is_worker: Ray started it for its job; a driver, or a process outside of the cluster, is a
            job of its own.
    """

    source_id: str
    cluster_id: str
    node_id: str
    run_epoch: int
    pid: int
    hostname: str
    started_at: float
    version: str
    job_id: str = ""
    is_worker: bool = False


class Channel(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """Opens a numbered channel: rows that follow with this number belong to its stage.

    A series (``label`` set) shares its namespace with others: the first of a run is called
    ``stage``, further ones ``stage/<label>_<n>``; its rows carry ``axis`` themselves.

    Attributes:
        run: number of the stage's own run, in which its keys carry no prefix; 0 for the cluster's.
        session: how often that run was opened; the run ends when all channels of its last session
            have. 0 in a forked child, whose end says nothing of the run.
    """

    channel: int
    stage: str | None
    rank: int | None
    world_size: int | None
    label: str | None = None
    axis: str | None = None
    run: int = 0
    session: int = 0


#: First element of a row; in its encoded form the second byte, after the array's own.
ROW_TAG = 0

#: The same of a table, which is a row of the run as well.
TABLE_TAG = 8


class Row(msgspec.Struct, array_like=True, tag=ROW_TAG, frozen=True, gc=False):
    """One ``log()``: the values of one moment, at the user's own step where there is one."""

    channel: int
    time_s: float
    step: int | float | None
    metrics: dict[str, Scalar]


class ConfigUpdate(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Values for the run's config; later ones win."""

    channel: int
    values: dict[str, Any]


class SummaryUpdate(msgspec.Struct, array_like=True, tag=4, frozen=True):
    """Values for the run's summary; later ones win."""

    channel: int
    values: dict[str, Any]


class Define(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """A metric definition as ``wandb.define_metric`` takes it; names are relative.

    ``across_ranks`` says how the values of several ranks at one step become one.
    """

    channel: int
    name: str
    step_metric: str | None
    summary: str | None
    across_ranks: str | None = None


class Counters(msgspec.Struct, array_like=True, tag=6, frozen=True):
    """What the client could not take, as running totals: repeating them changes nothing."""

    rejected: int
    lost: dict[str, int]


class End(msgspec.Struct, array_like=True, tag=7, frozen=True):
    """Last frame of a source: it ended in good order, or was killed and is all here.

    Whoever brings home the journal of a killed process writes the frame in its place.

    Attributes:
        failed: of the driver that owns the run: whether an exception that nobody caught ended it.
            None of all others, and where ``finish()`` was called before.
    """

    time_s: float
    killed: bool = False
    failed: bool | None = None


class Table(msgspec.Struct, array_like=True, tag=TABLE_TAG, frozen=True):
    """One ``log_table()``: a row of the run that holds a whole table; its name is relative."""

    channel: int
    time_s: float
    name: str
    columns: list[str]
    rows: list[list[Cell]]


class ArtifactFile(msgspec.Struct, array_like=True, frozen=True):
    """A file of an artifact: its path there, its SHA-256 as hex digits, its size."""

    path: str
    digest: str
    size_bytes: int


class Artifact(msgspec.Struct, array_like=True, tag=9, frozen=True):
    """One ``log_artifact()``; the files' contents come on a lane of their own, by digest.

    ``kind`` is what W&B calls the artifact's type.
    """

    channel: int
    name: str
    kind: str
    files: list[ArtifactFile]


class Alert(msgspec.Struct, array_like=True, tag=10, frozen=True):
    """One ``alert()``; ``level`` is INFO, WARN or ERROR."""

    channel: int
    title: str
    text: str
    level: str


class EndChannel(msgspec.Struct, array_like=True, tag=11, frozen=True):
    """The client of a stage's own run was closed: nothing more comes by this channel.

    ``exit_code`` is 0 for a good end.
    """

    channel: int
    exit_code: int


class Owner(msgspec.Struct, array_like=True, tag=20, frozen=True):
    """This source is the driver whose ``start()`` opened the run with this number.

    Attributes:
        journal: the source's directory on its node.
        ends_cluster: it started the Ray cluster, which ends with it.
    """

    run_epoch: int
    journal: str
    ends_cluster: bool


Message = (
    Hello
    | Channel
    | Row
    | ConfigUpdate
    | SummaryUpdate
    | Define
    | Counters
    | End
    | Table
    | Artifact
    | Alert
    | EndChannel
    | Owner
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

#: Encodes one message to bytes.
encode = _encoder.encode


def decode(payload: bytes | memoryview) -> Message:
    """Decode one message.

    Raises:
        FrameError: the bytes are no message of this protocol.
    """
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"a frame holds no message of protocol {PROTOCOL}: {error}") from error


def frame(payload: bytes) -> bytes:
    """Wrap an encoded message into a frame."""
    return HEADER.pack(MARK, len(payload), checksum(payload)) + payload


_END_FRAME_BYTES = len(frame(encode(End(0.0))))


def end_of_source(data: bytes) -> End | None:
    """The :class:`End` with which a batch ends, or None when it ends with anything else.

    It looks at the last few bytes only, so it may be asked for every batch.
    """
    found = _frame_at(memoryview(data), max(len(data) - _END_FRAME_BYTES, 0))
    if found is None or found.end != len(data):
        return None
    try:
        message = decode(found.payload)
    except FrameError:
        return None  # damage, which whoever reads the batch counts
    return message if isinstance(message, End) else None


class Frame(NamedTuple):
    """A whole frame found in a buffer: its bounds there, and its message's bytes."""

    start: int
    end: int
    payload: memoryview


class Damage(NamedTuple):
    """A stretch of a buffer that holds no whole frame, between two that are."""

    start: int
    end: int


def _frame_at(view: memoryview, start: int) -> Frame | None:
    if start + HEADER.size > len(view):
        return None
    mark, length, expected = HEADER.unpack_from(view, start)
    end = start + HEADER.size + length
    if mark != MARK or length > MAX_MESSAGE_BYTES or end > len(view):
        return None
    payload = view[start + HEADER.size : end]
    return Frame(start, end, payload) if checksum(payload) == expected else None


def scan(data: bytes | memoryview) -> Iterator[Frame | Damage]:
    """Yield the frames of a buffer in order, and the damaged stretches between them.

    Nothing raises: after damage the search goes on at the next byte that starts a whole frame,
    within a bound on the work; what lies beyond the bound is one more stretch of damage.
    """
    view = memoryview(data)
    position, size = 0, len(view)
    unpack, header_bytes = HEADER.unpack_from, HEADER.size
    while position < size:
        begin = position + header_bytes
        if begin <= size:
            # What _frame_at does, in place: this is the service's path for every single row.
            mark, length, expected = unpack(view, position)
            end = begin + length
            if mark == MARK and length <= MAX_MESSAGE_BYTES and end <= size:
                payload = view[begin:end]
                if checksum(payload) == expected:
                    yield Frame(position, end, payload)
                    position = end
                    continue
        resumed = _resync(view, position + 1)
        yield Damage(position, resumed)
        position = resumed


def _resync(view: memoryview, position: int) -> int:
    """Where the next whole frame starts at or after ``position``, or the buffer's end."""
    mark = MARK.to_bytes(2, "little")
    data = bytes(view)
    budget = RESYNC_BUDGET_BYTES
    while budget > 0 and (position := data.find(mark, position)) >= 0:
        if position + HEADER.size <= len(data):
            _, length, _ = HEADER.unpack_from(data, position)
            if position + HEADER.size + length <= len(data):
                budget -= length + HEADER.size
                if _frame_at(view, position) is not None:
                    return position
        position += 1
    return len(data)


def last_whole_frame(data: bytes | memoryview) -> int:
    """Length of the leading part of ``data`` that ends where a frame ends; 0 when none is whole.

    Headers are read, and the last frame's checksum: this is for cutting a batch, not for checking
    it. Damage travels, and is counted by the service: the cut falls before it, or where it begins
    the buffer, behind it. No whole frame is ever cut in two.
    """
    position = previous = 0
    size = len(data)
    damaged = False
    while position + HEADER.size <= size:
        mark, length, _ = HEADER.unpack_from(data, position)
        damaged = mark != MARK or length > MAX_MESSAGE_BYTES
        end = position + HEADER.size + length
        if damaged or end > size:
            break
        previous, position = position, end
    view = memoryview(data)
    if position and _frame_at(view, previous) is None:
        # Its length may be what is damaged, and have led into the middle of another frame.
        position, damaged = previous, True
    return position if position or not damaged else cut_behind_damage(view)


def first_frame_is_whole(data: bytes | memoryview) -> bool:
    """Whether ``data`` begins with a frame whose checksum holds."""
    return _frame_at(memoryview(data), 0) is not None


def holds_later_frame(data: bytes | memoryview) -> bool:
    """Whether a whole frame begins somewhere behind the first byte."""
    return _resync(memoryview(data), 1) < len(data)


def cut_behind_damage(data: bytes | memoryview) -> int:
    """Where, behind the first byte, a frame begins: one that is whole, or goes beyond the end.

    Returns the length of ``data`` when no frame begins in it any more.
    """
    view = memoryview(data)
    raw = bytes(view)
    mark = MARK.to_bytes(2, "little")
    budget = RESYNC_BUDGET_BYTES
    position = 1
    while budget > 0 and (position := raw.find(mark, position)) >= 0:
        if position + HEADER.size > len(raw):
            return position
        _, length, _ = HEADER.unpack_from(raw, position)
        if length <= MAX_MESSAGE_BYTES:
            beyond = position + HEADER.size + length > len(raw)
            if beyond or _frame_at(view, position) is not None:
                return position
            budget -= length + HEADER.size
        position += 1
    half_a_mark = position < 0 and len(raw) > 1 and raw.endswith(mark[:1])
    return len(raw) - 1 if half_a_mark else len(raw)
