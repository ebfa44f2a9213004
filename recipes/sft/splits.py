"""Which split a conversation belongs to, and what the files of a split are called.

It depends on nothing but the conversation's own words and the settings: more input moves nobody,
and a conversation that is there twice is in one split only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import xxhash

from recipes.settings import AtLeast
from recipes.sft.turns import Conversation

__all__ = ["SPLITS", "SplitSettings", "split_ending", "split_of"]

SPLITS = ("train", "valid", "test")

Share = Annotated[float, AtLeast(0)]


@dataclass(frozen=True)
class SplitSettings:
    """Which share of the conversations each split gets; only their ratio counts."""

    train: Share
    valid: Share
    test: Share
    seed: int


def split_ending(split: str) -> str:
    """Return what follows a shard's name in the name of the file that holds one split of it."""
    return f".{split}.parquet"


def split_of(conversation: Conversation, settings: SplitSettings) -> str:
    """Return the split that a conversation belongs to, by its words and the seed alone."""
    words = json.dumps(
        [settings.seed, conversation.messages, conversation.tools],
        sort_keys=True,
        ensure_ascii=False,
        separators=(",", ":"),
    )
    shares = [settings.train, settings.valid, settings.test]
    place = xxhash.xxh3_64_intdigest(words.encode()) / 2**64 * sum(shares)
    for split, share in zip(SPLITS, shares, strict=True):
        if place < share:
            return split
        place -= share
    return next(split for split, share in zip(SPLITS, shares, strict=True) if share)
