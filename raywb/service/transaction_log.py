"""Which rows a W&B transaction log really holds: the offline sink's cursor.

A ``.wandb`` file is seven bytes of header and a LevelDB log: blocks of 32 KiB that hold
fragments (CRC-32 of kind and body, length, kind), joined to ``wandb_internal_pb2.Record``
messages. A client that was killed leaves it torn anywhere, so only whole, undamaged fragments
count. This module reads with W&B's own message definitions and is imported in the sink's
process only.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Segment", "find_segments", "read_artifacts", "read_row_time", "read_segment"]

_HEADER_BYTES = 7
_BLOCK_BYTES = 32 * 1024
_FRAGMENT = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class Segment(NamedTuple):
    """What one file holds.

    Attributes:
        rows: how many rows.
        next_row: the number after the last one.
        ended: the run was ended in it.
        summary_keys: keys that the client itself set in the summary behind the last row.
        alerts: how many alerts.
    """

    rows: int
    next_row: int
    ended: bool
    summary_keys: frozenset[str] = frozenset()
    alerts: int = 0


def find_segments(wandb_dir: Path, run_id: str) -> list[Path]:
    """The offline files of one run, oldest first.

    W&B puts ``-1`` behind the name of a directory when two begin in the same second.
    """
    return sorted(wandb_dir.glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb"))


def _messages(path: Path) -> Iterator[bytes]:
    """Yield the whole messages of a file, up to the first damage."""
    with open(path, "rb") as file:
        if len(file.read(_HEADER_BYTES)) < _HEADER_BYTES:
            return
        file.seek(0)
        parts: list[bytes] = []
        offset = _HEADER_BYTES
        while block := file.read(_BLOCK_BYTES):
            while offset + _FRAGMENT.size <= len(block):
                crc, length, kind = _FRAGMENT.unpack_from(block, offset)
                body_at = offset + _FRAGMENT.size
                body = block[body_at : body_at + length]
                if kind == 0 and length == 0:
                    break  # the rest of a block that had no room for a fragment
                if len(body) < length or zlib.crc32(bytes([kind]) + body) != crc:
                    return
                if kind in (_FULL, _FIRST):
                    parts.clear()
                parts.append(body)
                if kind in (_FULL, _LAST):
                    yield b"".join(parts)
                offset = body_at + length
            offset = 0


def _records(path: Path) -> Iterator[tuple[str | None, Any]]:
    """Yield kind and record of what a file holds, up to the first damage; each until the next."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    for message in _messages(path):
        try:
            record.ParseFromString(message)
        except DecodeError:
            return
        yield record.WhichOneof("record_type"), record


def read_segment(path: Path) -> Segment:
    """Count the rows of a file, from its history records."""
    rows = 0
    next_row = 0
    ended = False
    alerts = 0
    summary_keys: set[str] = set()
    for kind, record in _records(path):
        if kind == "history":
            rows += 1
            next_row = record.history.step.num + 1
            summary_keys.clear()
        elif kind == "summary":
            # What wandb-core makes of a row by itself it writes as nested keys.
            summary_keys |= {item.key for item in record.summary.update if item.key}
        elif kind == "exit":
            ended = True
        alerts += kind == "alert"
    return Segment(rows, next_row, ended, frozenset(summary_keys), alerts)


def read_row_time(path: Path, step: int) -> float | None:
    """The time of the row with this step, unix seconds; None when the file has no such row."""
    for kind, record in _records(path):
        if kind == "history" and record.history.step.num == step:
            for item in record.history.item:
                if "_timestamp" in (item.key, *item.nested_key):
                    return float(item.value_json)
    return None


def read_artifacts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and digest of the artifacts that a file asks W&B to keep."""
    for kind, record in _records(path):
        if kind == "artifact":
            yield record.artifact.name, record.artifact.digest
