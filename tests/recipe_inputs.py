"""An input in many files and formats, and the way from wherever it lies to its documents."""

from __future__ import annotations

import gzip
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from recipes.stages.documents import DocumentReader
from recipes.stages.rows import RowCounts
from recipes.stages.scratch import Scratch
from recipes.stages.shards import Shard, cut_into_shards
from recipes.stages.sources import InputSettings, list_inputs

MAX_DOCUMENT_BYTES = 10_000
SHARD_BYTES = 6_000


def input_settings(*paths: object, **changes: object) -> InputSettings:
    """Return settings with what a recipe would have by default, but small shards."""
    defaults = {
        "format": "auto",
        "text_field": "text",
        "exclude": (),
        "limit_bytes": None,
        "shard_bytes": SHARD_BYTES,
        "max_document_bytes": MAX_DOCUMENT_BYTES,
    }
    return InputSettings(paths=tuple(map(str, paths)), **(defaults | changes))


@dataclass(frozen=True)
class Read:
    """What came out of an input."""

    names: list[str]
    shards: tuple[Shard, ...]
    texts: list[str]
    counts: RowCounts

    def the_same_rows_as(self, other: Read) -> bool:
        """Say whether two inputs hold the same documents, and lost the same rows."""
        return (self.texts, self.counts) == (other.texts, other.counts)


def read_input(scratch: Scratch, *paths: object, **changes: object) -> Read:
    """List, cut, fetch and read, as the stages of the recipe do."""
    settings = input_settings(*paths, **changes)
    files = list_inputs(settings)
    shards = cut_into_shards(files, settings.shard_bytes)
    reader = DocumentReader(settings.text_field, settings.max_document_bytes)
    texts = []
    for shard in shards:
        for file in scratch.fetch(shard):
            texts += reader.read(file)
        scratch.remove(shard)
    return Read([file.name for file in files], shards, texts, reader.counts)


def texts(count: int, seed: int, size: int = 60) -> list[str]:
    """Return texts that do not compress."""
    chance = random.Random(seed)
    return [f"{k} {chance.randbytes(size).hex()} ä" for k in range(count)]


def jsonl(rows: list[str]) -> bytes:
    """Return texts as JSONL."""
    return b"".join(
        json.dumps({"id": k, "text": row}).encode() + b"\n" for k, row in enumerate(rows)
    )


def parquet(rows: list[str], row_group_size: int, **options: object) -> bytes:
    """Return texts as Parquet, between two columns that nobody asked for."""
    size = 40 * len(rows)
    extra = pa.array(
        [random.Random(k).randbytes(size // max(len(rows), 1)) for k in range(len(rows))]
    )
    table = pa.table({"id": range(len(rows)), "text": rows, "extra": extra})
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=row_group_size, **options)
    return stream.getvalue()


def corpus() -> dict[str, bytes]:
    """Return files of every format; some larger than a shard, one with bad rows, one corrupt."""
    rows = jsonl(texts(100, 1)).splitlines(keepends=True)
    rows[50:50] = [b"\n", b"{broken\n", b'{"no": 1}\n']
    frames = [zstandard.compress(jsonl(texts(20, k))) for k in (3, 4)]
    return {
        "a-large.jsonl": b"".join(rows),
        "b-packed.jsonl.gz": gzip.compress(jsonl(texts(60, 2)), mtime=0),
        "c-frames.jsonl.zst": b"".join(frames),
        "d-large.parquet": parquet(texts(200, 5), row_group_size=30),
        "e-text.txt": "A text with a ß.".encode(),
        "f-broken.jsonl.zst": zstandard.compress(jsonl(texts(5, 6)))[:-5],
        "folder/g-deep.jsonl": jsonl(texts(3, 7)),
        "folder/h.bin": b"no input",
        "folder/.hidden.jsonl": jsonl(["hidden"]),
    }


#: Of the corpus, what is read of a directory, in order.
CORPUS_NAMES = [
    "a-large.jsonl",
    "b-packed.jsonl.gz",
    "c-frames.jsonl.zst",
    "d-large.parquet",
    "e-text.txt",
    "f-broken.jsonl.zst",
    "folder/g-deep.jsonl",
]


def lay_out(root: Path, files: dict[str, bytes]) -> Path:
    """Write files below a directory."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
