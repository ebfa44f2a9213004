"""A receipt says that a shard is finished, from what it was made, and where every row went.

It is written last and whole: a shard without a receipt that matches settings, input and both files
was never finished. The blend is drawn up from receipts alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from recipes.errors import CountsError
from recipes.stages.layout import OutputLayout, write_json

__all__ = [
    "Receipt",
    "Totals",
    "WrittenFile",
    "add_up",
    "check_counts",
    "hash_file",
    "matching_receipt",
    "write_blend",
    "write_receipt",
]

#: Changes when the meaning of a receipt's fields does; older ones then count as not there.
_VERSION = 1
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WrittenFile:
    """Size and xxh64 of a file as it was written."""

    size_bytes: int
    xxh64: str


@dataclass(frozen=True)
class Receipt:
    """What went into a finished shard."""

    shard: str
    settings_fingerprint: str
    input_fingerprint: str
    rows_in: int
    rows_kept: int
    rows_filtered: dict[str, int]
    rows_errors: dict[str, int]
    tokens: int
    bin: WrittenFile
    idx: WrittenFile
    version: int = _VERSION


@dataclass(frozen=True)
class Totals:
    """The rows and tokens of many shards."""

    shards: int
    rows_in: int
    rows_kept: int
    rows_filtered: dict[str, int]
    rows_errors: dict[str, int]
    tokens: int
    size_bytes: int


def write_receipt(layout: OutputLayout, receipt: Receipt) -> None:
    """Write a shard's receipt: from here on the shard is finished."""
    check_counts(receipt)
    write_json(layout.receipt(receipt.shard), dataclasses.asdict(receipt))


def matching_receipt(
    layout: OutputLayout, shard: str, settings_fingerprint: str, input_fingerprint: str
) -> Receipt | None:
    """Return the receipt of a finished shard, or None when the shard has to be made.

    A shard counts as finished only if its receipt is of these settings and this input, and both
    files have the size and the hash that it names.
    """
    receipt = _read_receipt(layout.receipt(shard))
    if (
        receipt is None
        or receipt.shard != shard
        or receipt.settings_fingerprint != settings_fingerprint
        or receipt.input_fingerprint != input_fingerprint
    ):
        return None
    prefix = layout.shard_prefix(shard)
    whole = _is_as_written(Path(f"{prefix}.bin"), receipt.bin) and _is_as_written(
        Path(f"{prefix}.idx"), receipt.idx
    )
    return receipt if whole else None


def check_counts(counted: Receipt | Totals) -> None:
    """Hold rows in against rows kept, filtered and errors.

    Raises:
        CountsError: A row was lost or counted twice.
    """
    filtered, errors = sum(counted.rows_filtered.values()), sum(counted.rows_errors.values())
    if counted.rows_in != counted.rows_kept + filtered + errors:
        name = counted.shard if isinstance(counted, Receipt) else "all shards"
        raise CountsError(
            f"{name}: {counted.rows_in} rows in, but {counted.rows_kept} kept + {filtered} "
            f"filtered + {errors} errors; please report this"
        )


def add_up(receipts: Iterable[Receipt]) -> Totals:
    """Add up the rows and tokens of many shards, and check the sums."""
    receipts = list(receipts)
    filtered: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for receipt in receipts:
        filtered.update(receipt.rows_filtered)
        errors.update(receipt.rows_errors)
    totals = Totals(
        shards=len(receipts),
        rows_in=sum(receipt.rows_in for receipt in receipts),
        rows_kept=sum(receipt.rows_kept for receipt in receipts),
        rows_filtered=dict(sorted(filtered.items())),
        rows_errors=dict(sorted(errors.items())),
        tokens=sum(receipt.tokens for receipt in receipts),
        size_bytes=sum(receipt.bin.size_bytes + receipt.idx.size_bytes for receipt in receipts),
    )
    check_counts(totals)
    return totals


def write_blend(layout: OutputLayout, receipts: Iterable[Receipt], tokenizer_xxh64: str) -> None:
    """Write the blend: every shard that holds documents, weighted by its tokens.

    ``blend`` is the list that Megatron takes, weight and prefix in turn; prefixes are relative to
    the directory of the file, so that the whole directory can be moved.
    """
    filled = sorted(
        (receipt for receipt in receipts if receipt.rows_kept), key=lambda receipt: receipt.shard
    )
    prefixes = [
        layout.shard_prefix(receipt.shard).relative_to(layout.root).as_posix() for receipt in filled
    ]
    content = {
        "blend": [
            item
            for receipt, prefix in zip(filled, prefixes, strict=True)
            for item in (str(receipt.tokens), prefix)
        ],
        "shards": [
            {
                "prefix": prefix,
                "documents": receipt.rows_kept,
                "tokens": receipt.tokens,
                "bin_xxh64": receipt.bin.xxh64,
                "idx_xxh64": receipt.idx.xxh64,
            }
            for receipt, prefix in zip(filled, prefixes, strict=True)
        ],
        "documents": sum(receipt.rows_kept for receipt in filled),
        "tokens": sum(receipt.tokens for receipt in filled),
        "tokenizer": layout.tokenizer.name,
        "tokenizer_xxh64": tokenizer_xxh64,
    }
    write_json(layout.blend, content)


def hash_file(path: Path) -> WrittenFile:
    """Return size and xxh64 of a file, read in pieces."""
    digest = xxhash.xxh64()
    size_bytes = 0
    with path.open("rb") as file:
        while piece := file.read(_HASH_CHUNK_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
    return WrittenFile(size_bytes, digest.hexdigest())


def _read_receipt(path: Path) -> Receipt | None:
    """Return a receipt, or None where there is none, a damaged one, or one of another version."""
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(raw, Mapping) or raw.get("version") != _VERSION:
        return None
    try:
        files = {name: WrittenFile(**raw[name]) for name in ("bin", "idx")}
        return Receipt(**{**raw, **files})
    except (TypeError, KeyError):
        return None


def _is_as_written(path: Path, written: WrittenFile) -> bool:
    """Compare a file with what was written; the size first, as it costs nothing."""
    try:
        return path.stat().st_size == written.size_bytes and hash_file(path) == written
    except FileNotFoundError:
        return False
