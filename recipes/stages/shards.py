"""Cutting the inputs into shards: the unit of work, of output, and of resuming.

A shard is a list of slices. A slice is a whole file, or a range of bytes of a large JSONL or
Parquet file; a line or a row group belongs to the slice in which it begins. The cut depends on the
listing and ``shard_bytes`` only, so every start with the same input finds the same shards.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import xxhash

from recipes.stages.sources import InputFile

__all__ = ["InputSlice", "Shard", "cut_into_shards", "fingerprint"]


@dataclass(frozen=True)
class InputSlice:
    """Bytes ``start`` to ``end`` of a file as it is stored."""

    file: InputFile
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Stored size: of a compressed file, its compressed bytes; assumed where it is unknown."""
        return self.end - self.start

    def identity(self) -> dict[str, object]:
        """Return what must be the same for the slice to hold the same documents."""
        return {
            "name": self.file.name,
            "version": self.file.version,
            "size_bytes": self.file.size_bytes,
            "format": self.file.format,
            "range": [self.start, self.end],
        }


@dataclass(frozen=True)
class Shard:
    """One task of the pipeline and one dataset of the output."""

    name: str
    slices: tuple[InputSlice, ...]

    @property
    def size_bytes(self) -> int:
        """Stored bytes of all its slices."""
        return sum(piece.size_bytes for piece in self.slices)

    @property
    def input_fingerprint(self) -> str:
        """Another text whenever the shard's input is another."""
        return fingerprint([piece.identity() for piece in self.slices])


def cut_into_shards(
    files: Iterable[InputFile], shard_bytes: int, limit_bytes: int | None = None
) -> tuple[Shard, ...]:
    """Put the files into shards of about ``shard_bytes``, in their order.

    Args:
        files: The inputs, in the order in which their documents shall follow each other.
        shard_bytes: A shard gets another slice while it stays at or under this size.
        limit_bytes: Stop before the slice that would exceed this many bytes; one is always taken.
    """
    groups: list[list[InputSlice]] = []
    group_bytes = total_bytes = 0
    for piece in _slices(files, shard_bytes):
        if limit_bytes is not None and groups and total_bytes + piece.size_bytes > limit_bytes:
            break
        if not groups or group_bytes + piece.size_bytes > shard_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(piece)
        group_bytes += piece.size_bytes
        total_bytes += piece.size_bytes
    return tuple(Shard(f"shard-{k:05d}", tuple(group)) for k, group in enumerate(groups))


def _slices(files: Iterable[InputFile], slice_bytes: int) -> Iterator[InputSlice]:
    for file in files:
        # a file of unknown size may hold anything: as far as sizes go, it fills a slice
        size_bytes = slice_bytes if file.size_bytes is None else file.size_bytes
        by_rows = file.format in ("jsonl", "parquet") and file.compression is None
        divided = by_rows and file.divisible and size_bytes > slice_bytes
        step = slice_bytes if divided else max(size_bytes, 1)
        for start in range(0, max(size_bytes, 1), step):
            yield InputSlice(file, start, min(start + step, size_bytes))


def fingerprint(content: object) -> str:
    """Return 32 hex digits that stand for a JSON-like value."""
    if dataclasses.is_dataclass(content) and not isinstance(content, type):
        content = dataclasses.asdict(content)
    elif isinstance(content, Mapping):
        content = dict(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))
