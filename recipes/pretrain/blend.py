"""The blend: what a pretraining run reads, shard by shard."""

from __future__ import annotations

from collections.abc import Iterable

from recipes.stages.layout import OutputLayout, write_json
from recipes.stages.receipts import Receipt

__all__ = ["write_blend"]


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
                "bin_xxh64": receipt.files[".bin"].xxh64,
                "idx_xxh64": receipt.files[".idx"].xxh64,
            }
            for receipt, prefix in zip(filled, prefixes, strict=True)
        ],
        "documents": sum(receipt.rows_kept for receipt in filled),
        "tokens": sum(receipt.tokens for receipt in filled),
        "tokenizer": layout.tokenizer.name,
        "tokenizer_xxh64": tokenizer_xxh64,
    }
    write_json(layout.blend, content)
