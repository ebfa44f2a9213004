"""A receipt says that a shard is finished, from what it was made, and where every row went.

It is written last and whole: a shard without a receipt that matches settings, input and every file
was never finished. A recipe's blend is drawn up from receipts alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from recipes.errors import CountsError
from recipes.stages.layout import OutputLayout, write_json

__all__ = [
    "Receipt",
    "SplitCounts",
    "Totals",
    "WrittenFile",
    "add_up",
    "check_counts",
    "hash_file",
    "matching_receipt",
    "write_receipt",
]

#: Changes when a receipt's fields do.
_VERSION = 2
#: Version 1 was of the one recipe that there was, and had a field for each of its two files.
_FILES_OF_VERSION_1 = ("bin", "idx")
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class WrittenFile:
    """Size and xxh64 of a file as it was written."""

    size_bytes: int
    xxh64: str


@dataclass(frozen=True)
class SplitCounts:
    """What a shard holds for one split, such as train or valid."""

    rows: int
    packs: int
    tokens: int

    def __add__(self, other: SplitCounts) -> SplitCounts:
        return SplitCounts(
            self.rows + other.rows, self.packs + other.packs, self.tokens + other.tokens
        )


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
    #: Every file of the shard, by its ending: what follows the shard's name.
    files: dict[str, WrittenFile]
    #: By name, where the rows of a dataset are split: together they hold every row that was kept.
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    #: Which share of its packs is filled, 0 to 1; None where nothing is packed.
    packing_efficiency: float | None = None
    version: int = _VERSION

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size_bytes for file in self.files.values())


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
    splits: dict[str, SplitCounts] = field(default_factory=dict)


def write_receipt(layout: OutputLayout, receipt: Receipt) -> None:
    """Write a shard's receipt: from here on the shard is finished."""
    check_counts(receipt)
    write_json(layout.receipt(receipt.shard), dataclasses.asdict(receipt))


def matching_receipt(
    layout: OutputLayout, shard: str, settings_fingerprint: str, input_fingerprint: str
) -> Receipt | None:
    """Return the receipt of a finished shard, or None when the shard has to be made.

    A shard counts as finished only if its receipt is of these settings and this input, and every
    file has the size and the hash that it names.
    """
    receipt = _read_receipt(layout.receipt(shard))
    if (
        receipt is None
        or receipt.shard != shard
        or receipt.settings_fingerprint != settings_fingerprint
        or receipt.input_fingerprint != input_fingerprint
    ):
        return None
    whole = all(
        _is_as_written(layout.shard_file(shard, ending), written)
        for ending, written in receipt.files.items()
    )
    return receipt if whole else None


def check_counts(counted: Receipt | Totals) -> None:
    """Hold rows in against rows kept, filtered and errors, and rows kept against the splits.

    Raises:
        CountsError: A row was lost or counted twice.
    """
    filtered, errors = sum(counted.rows_filtered.values()), sum(counted.rows_errors.values())
    name = counted.shard if isinstance(counted, Receipt) else "all shards"
    if counted.rows_in != counted.rows_kept + filtered + errors:
        raise CountsError(
            f"{name}: {counted.rows_in} rows in, but {counted.rows_kept} kept + {filtered} "
            f"filtered + {errors} errors; please report this"
        )
    split_rows = {split: counts.rows for split, counts in counted.splits.items()}
    if split_rows and counted.rows_kept != sum(split_rows.values()):
        parts = ", ".join(f"{rows} in {split}" for split, rows in split_rows.items())
        raise CountsError(f"{name}: {counted.rows_kept} rows kept, but {parts}; please report this")


def add_up(receipts: Iterable[Receipt]) -> Totals:
    """Add up the rows and tokens of many shards, and check the sums."""
    receipts = list(receipts)
    filtered: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    splits: dict[str, SplitCounts] = {}
    for receipt in receipts:
        filtered.update(receipt.rows_filtered)
        errors.update(receipt.rows_errors)
        for name, split in receipt.splits.items():
            splits[name] = splits.get(name, SplitCounts(0, 0, 0)) + split
    totals = Totals(
        shards=len(receipts),
        rows_in=sum(receipt.rows_in for receipt in receipts),
        rows_kept=sum(receipt.rows_kept for receipt in receipts),
        rows_filtered=dict(sorted(filtered.items())),
        rows_errors=dict(sorted(errors.items())),
        tokens=sum(receipt.tokens for receipt in receipts),
        size_bytes=sum(receipt.size_bytes for receipt in receipts),
        splits=splits,
    )
    check_counts(totals)
    return totals


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
    if not isinstance(raw, Mapping) or raw.get("version") not in (1, _VERSION):
        return None
    fields = dict(raw)
    try:
        if fields["version"] == 1:
            files = {f".{name}": fields.pop(name) for name in _FILES_OF_VERSION_1}
            fields |= {"files": files, "version": _VERSION}
        fields["files"] = {
            ending: WrittenFile(**written) for ending, written in fields["files"].items()
        }
        fields["splits"] = {
            name: SplitCounts(**split) for name, split in fields.get("splits", {}).items()
        }
        return Receipt(**fields)
    except (TypeError, KeyError, AttributeError):
        return None


def _is_as_written(path: Path, written: WrittenFile) -> bool:
    """Compare a file with what was written; the size first, as it costs nothing."""
    try:
        return path.stat().st_size == written.size_bytes and hash_file(path) == written
    except FileNotFoundError:
        return False
