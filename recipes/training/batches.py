"""Token ids become batches, in an order that depends on nothing but seed and place.

A training has an endless order of samples: place ``p`` is sample ``p % size`` of epoch
``p // size``, each epoch shuffled anew. Step ``s`` takes the places from ``(s - 1) · batch_size``,
and each rank its share of them, so that a training that goes on from a checkpoint, even with
another number of workers, sees the batches that it would have seen. Nothing here needs torch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

__all__ = [
    "IGNORED",
    "Batch",
    "Ids",
    "Order",
    "Pack",
    "SampleSource",
    "Samples",
    "Shuffle",
    "batch_of_packs",
    "batch_of_windows",
    "places_of_rank",
]

Ids = npt.NDArray[np.int64]

#: A target that is not to be predicted; the number that torch's cross entropy passes over.
IGNORED = -100

#: Rounds of the Feistel network; from four on it is as good as random.
_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """What a model is shown and what it shall say, all of shape (samples, tokens).

    Attributes:
        input_ids: token ids; what is behind the end of a sample is padding.
        targets: the token that follows each, or ``IGNORED``.
        tokens: tokens that are no padding.
        positions: place of each token in its own conversation; None: in the sample.
        segments: number of the conversation that each token belongs to, 0 for padding; no token
            looks at another segment. None: each sample is one segment.
    """

    input_ids: Ids
    targets: Ids
    tokens: int
    positions: Ids | None = None
    segments: Ids | None = None


class Samples(Protocol):
    """Samples on disk, in an endless order."""

    @property
    def size(self) -> int:
        """How many there are; they come once each before any comes again."""

    def batch(self, places: Sequence[int]) -> Batch:
        """Read the samples of these places of the order; there is at least one."""


class SampleSource(Protocol):
    """Says where samples are, and travels to the workers."""

    def open(self, seed: int) -> tuple[Samples, Samples]:
        """Open the samples to train on and those to validate with, of which there may be none."""


class Shuffle:
    """A permutation of ``range(size)`` that needs no memory: ``shuffle[k]`` is the ``k``-th.

    A Feistel network over the next power of four, walked until it is back in the range.
    """

    def __init__(self, size: int, *key: int) -> None:
        self._size = size
        self._key = xxhash.xxh64_intdigest(struct.pack(f"<{len(key)}Q", *key))
        self._half_bits = max((size - 1).bit_length() + 1, 2) // 2
        self._mask = (1 << self._half_bits) - 1

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(index)
        while True:
            left, right = index >> self._half_bits, index & self._mask
            for number in range(_ROUNDS):
                mixed = xxhash.xxh64_intdigest(struct.pack("<QQ", right, number), self._key)
                left, right = right, left ^ (mixed & self._mask)
            index = left << self._half_bits | right
            if index < self._size:
                return index


class Order:
    """An endless order of ``size`` samples: ``order[place]`` is the sample of that place."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._epoch = -1
        self._shuffle = Shuffle(size)

    def __getitem__(self, place: int) -> int:
        epoch, index = divmod(place, self._size)
        if epoch != self._epoch:
            self._epoch, self._shuffle = epoch, Shuffle(self._size, self._seed, epoch)
        return self._shuffle[index]


def places_of_rank(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """Return the places that a rank takes at a step, of which the first is number 1."""
    share = batch_size // world_size
    begin = (step - 1) * batch_size + rank * share
    return range(begin, begin + share)


def batch_of_windows(windows: Sequence[npt.NDArray[np.integer]]) -> Batch:
    """Make a batch of windows of one length, each a token longer than what the model is shown."""
    ids = np.stack(windows).astype(np.int64)
    return Batch(ids[:, :-1], ids[:, 1:], tokens=ids[:, 1:].size)


@dataclass(frozen=True)
class Pack:
    """Conversations, end to end.

    Attributes:
        input_ids: the tokens of all of them.
        loss_mask: 1 where the token is to be predicted.
        starts: where each conversation begins; the first at 0.
    """

    input_ids: npt.NDArray[np.integer]
    loss_mask: npt.NDArray[np.integer]
    starts: npt.NDArray[np.integer]


def batch_of_packs(packs: Sequence[Pack]) -> Batch:
    """Make a batch of packs, padded to the longest.

    A token is predicted where its mask says so, but never a conversation's first one: what came
    before it belongs to another conversation.
    """
    longest = max(max(len(pack.input_ids) for pack in packs) - 1, 1)
    shape = (len(packs), longest)
    input_ids, positions, segments = (np.zeros(shape, np.int64) for _ in range(3))
    targets = np.full(shape, IGNORED, np.int64)
    for row, pack in enumerate(packs):
        length = len(pack.input_ids) - 1
        if length < 1:
            continue
        ids = pack.input_ids.astype(np.int64)
        places = np.arange(length)
        numbers = np.searchsorted(pack.starts, places, side="right")
        wanted = pack.loss_mask[1:] != 0
        wanted[pack.starts[(pack.starts > 0) & (pack.starts <= length)] - 1] = False
        input_ids[row, :length] = ids[:-1]
        targets[row, :length] = np.where(wanted, ids[1:], IGNORED)
        positions[row, :length] = places - pack.starts[numbers - 1]
        segments[row, :length] = numbers
    return Batch(input_ids, targets, int((segments > 0).sum()), positions, segments)
