"""The blend: what a fine-tuning run reads, split by split."""

from __future__ import annotations

from collections.abc import Iterable

from recipes.sft.packing import efficiency
from recipes.sft.splits import SPLITS, split_ending
from recipes.stages.layout import OutputLayout, write_json
from recipes.stages.receipts import Receipt

__all__ = ["write_blend"]


def write_blend(
    layout: OutputLayout, receipts: Iterable[Receipt], pack_size: int, tokenizer_xxh64: str
) -> None:
    """Write the blend: of every split the shards that have packs of it.

    Paths are relative to the directory of the file, so that the whole directory can be moved.
    """
    ordered = sorted(receipts, key=lambda receipt: receipt.shard)
    splits = {split: _split(layout, ordered, split, pack_size) for split in SPLITS}
    packs = sum(counts.packs for receipt in ordered for counts in receipt.splits.values())
    tokens = sum(receipt.tokens for receipt in ordered)
    content = {
        "splits": splits,
        "pack_size": pack_size,
        "packing_efficiency": efficiency(tokens, packs, pack_size),
        "tokenizer": layout.tokenizer.name,
        "tokenizer_xxh64": tokenizer_xxh64,
    }
    write_json(layout.blend, content)


def _split(
    layout: OutputLayout, receipts: Iterable[Receipt], split: str, pack_size: int
) -> dict[str, object]:
    ending = split_ending(split)
    filled = [receipt for receipt in receipts if ending in receipt.files]
    packs = sum(receipt.splits[split].packs for receipt in filled)
    tokens = sum(receipt.splits[split].tokens for receipt in filled)
    return {
        "shards": [
            {
                "path": layout.shard_file(receipt.shard, ending)
                .relative_to(layout.root)
                .as_posix(),
                "packs": receipt.splits[split].packs,
                "tokens": receipt.splits[split].tokens,
                "xxh64": receipt.files[ending].xxh64,
            }
            for receipt in filled
        ],
        "packs": packs,
        "tokens": tokens,
        "conversations": sum(receipt.splits[split].rows for receipt in filled),
        "packing_efficiency": efficiency(tokens, packs, pack_size),
    }
