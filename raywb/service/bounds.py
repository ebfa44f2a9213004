"""What a message may hold: checked once, before the service believes it.

A source is a process of the user's, which may be broken or hostile. What passes here can be
written to the outbox, shown in the status and handed to W&B's client without a further look.
"""

from __future__ import annotations

import math
import re
from typing import Any

from raywb.errors import FrameError
from raywb.rows import (
    ACROSS_RANKS,
    MAX_ARTIFACT_BYTES,
    Alert,
    Artifact,
    Channel,
    ConfigUpdate,
    Counters,
    Define,
    Hello,
    Message,
    Owner,
    Row,
    SummaryUpdate,
    Table,
    is_digest,
    is_plain_path,
)

__all__ = ["MAX_REASONS", "check"]

#: Longest name of a stage, a host, a metric.
MAX_NAME_CHARS = 1024

#: Most channels of one source; a process needs one for each stage that it logs.
MAX_CHANNELS = 100_000

#: Deepest nesting of a config.
MAX_DEPTH = 100

#: Most reasons for losses that are told apart, over all sources.
MAX_REASONS = 64

#: Beyond it a count is no count, and sums of many would not fit into a message.
MAX_COUNT = 2**48

_ALERT_LEVELS = ("INFO", "WARN", "ERROR")

_REASON = re.compile(r"[a-z][a-z0-9_]{0,47}")


def check(message: Message) -> None:
    """Make sure that a message is one that a client of ours could have sent.

    Raises:
        FrameError: it is not; the text says why.
    """
    match message:
        case Row():
            if not math.isfinite(message.time_s):
                raise FrameError(f"a row at the time {message.time_s}")
        case ConfigUpdate() | SummaryUpdate():
            _check_plain(message.values, 0)
        case Counters():
            _check_counters(message)
        case Hello() | Owner():
            _check_names(message)
        case Channel():
            _check_names(message)
            if not 0 <= message.channel < MAX_CHANNELS or not 0 <= message.run < MAX_COUNT:
                raise FrameError(f"channel {message.channel} of one source, run {message.run}")
        case Define():
            _check_define(message)
        case Table() | Artifact() | Alert():
            _check_update(message)


def _check_define(message: Define) -> None:
    _check_names(message)
    if not message.name or "*" in message.name[:-1]:
        raise FrameError(f"a metric called {message.name!r}")
    if message.across_ranks is not None and message.across_ranks not in ACROSS_RANKS:
        raise FrameError(f"values of ranks joined by {message.across_ranks[:48]!r}")


def _check_update(message: Table | Artifact | Alert) -> None:
    match message:
        case Table():
            _check_table(message)
        case Artifact():
            _check_artifact(message)
        case Alert(title=title, level=level):
            if len(title) > MAX_NAME_CHARS:
                raise FrameError(f"an alert with a title of {len(title)} characters")
            if level not in _ALERT_LEVELS:
                raise FrameError(f"an alert of the level {level[:48]!r}")


def _check_table(message: Table) -> None:
    _check_names(message)
    if not math.isfinite(message.time_s):
        raise FrameError(f"a table at the time {message.time_s}")
    # W&B's client would refuse it again and again, and with it all rows behind it.
    if any(len(row) != len(message.columns) for row in message.rows):
        raise FrameError(f"a table of {len(message.columns)} columns with a row of other length")


def _check_artifact(message: Artifact) -> None:
    """The digests become names of files here, the paths wherever it is downloaded."""
    _check_names(message)
    if not message.name or not message.kind or not message.files:
        raise FrameError("an artifact without a name, a type or a file")
    for file in message.files:
        if not is_digest(file.digest) or not is_plain_path(file.path):
            raise FrameError(f"an artifact with the file {file.path[:80]!r}")
        if not 0 <= file.size_bytes <= MAX_ARTIFACT_BYTES:
            raise FrameError(f"an artifact with a file of {file.size_bytes} bytes")


def _check_counters(message: Counters) -> None:
    for reason, count in [("rejected", message.rejected), *message.lost.items()]:
        if not _REASON.fullmatch(reason) or not 0 <= count <= MAX_COUNT:
            raise FrameError(f"{count} rows lost for the reason {reason[:48]!r}")


def _check_names(message: Hello | Channel | Define | Table | Artifact | Owner) -> None:
    for field in message.__struct_fields__:
        value = getattr(message, field)
        if isinstance(value, str) and len(value) > MAX_NAME_CHARS:
            raise FrameError(f"a name of {len(value)} characters")


def _check_plain(value: Any, depth: int) -> None:
    """Dicts with names for keys, lists, and scalars: what JSON knows."""
    if depth > MAX_DEPTH:
        raise FrameError(f"a config that is nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise FrameError(f"a config with a key of type {type(key).__name__}")
            _check_plain(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, depth + 1)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise FrameError(f"a config with a value of type {type(value).__name__}")
