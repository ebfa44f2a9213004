"""Supervised fine-tuning: packs of conversations that data preparation wrote.

    shards of the split ``train``, in groups that are shuffled together
      → packs: conversations end to end, and which of their tokens are to be predicted
      → a small GPT in which no conversation sees another (recipes/training)
    the split ``valid`` is for validation

The loss is over the tokens that the mask names, each of which counts the same, in whichever pack
and on whichever rank it is.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from recipes.errors import TrainingError
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal
from recipes.tracking import TrackedRun
from recipes.training.batches import Batch, Pack, Shuffle, batch_of_packs
from recipes.training.launch import TrainResult, read_blend, train_on_cluster
from recipes.training.settings import TrainSettings

__all__ = ["PackSource", "find_packs", "train"]

#: Shards whose packs are shuffled together; those of two such groups are in memory at a time.
_GROUP = 8
_COLUMNS = ("input_ids", "loss_mask", "seq_start_id")

#: A shard's path, and how many packs it has.
Shard = tuple[Path, int]


class _Packs:
    """The packs of a split, in an endless order.

    Shards are taken in a random order, a few at a time, and the packs of these few are shuffled:
    so each shard is read once in an epoch, and few are in memory.
    """

    def __init__(self, shards: Sequence[Shard], seed: int) -> None:
        self._shards = shards
        self._seed = seed
        self._epoch = functools.lru_cache(2)(self._order_of_epoch)
        self._table = functools.lru_cache(2 * _GROUP)(_read)

    @property
    def size(self) -> int:
        """Packs of all shards."""
        return sum(packs for _, packs in self._shards)

    def batch(self, places: Sequence[int]) -> Batch:
        """Read the packs of these places of the order."""
        return batch_of_packs([self._pack(place) for place in places])

    def _pack(self, place: int) -> Pack:
        epoch, index = divmod(place, self.size)
        groups, begins = self._epoch(epoch)
        group = bisect_right(begins, index) - 1
        number = Shuffle(begins[group + 1] - begins[group], self._seed, epoch, group)[
            index - begins[group]
        ]
        for path, packs in groups[group]:
            if number < packs:
                return Pack(*(_row(self._table(path)[name], number) for name in _COLUMNS))
            number -= packs
        raise AssertionError("a group has as many packs as its shards")

    def _order_of_epoch(self, epoch: int) -> tuple[list[list[Shard]], list[int]]:
        """Return the groups of shards of an epoch, and at which place each of them begins."""
        order = Shuffle(len(self._shards), self._seed, epoch)
        shards = [self._shards[order[index]] for index in range(len(order))]
        groups = [shards[begin : begin + _GROUP] for begin in range(0, len(shards), _GROUP)]
        counts = (sum(packs for _, packs in group) for group in groups)
        return groups, [0, *itertools.accumulate(counts)]


def _read(path: Path) -> dict[str, Any]:
    table = pyarrow.parquet.read_table(path, columns=list(_COLUMNS))
    return {name: table.column(name).combine_chunks() for name in _COLUMNS}


def _row(column: Any, number: int) -> Any:
    begin, end = (column.offsets[at].as_py() for at in (number, number + 1))
    return np.asarray(column.values[begin:end])


@dataclass(frozen=True)
class PackSource:
    """Says where the packs of each split are."""

    training: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    def open(self, seed: int) -> tuple[_Packs, _Packs]:
        """Open the packs to train on and those to validate with."""
        return _Packs(self.training, seed), _Packs(self.validation, seed)


def train(
    settings: TrainSettings, layout: OutputLayout, run: TrackedRun, terminal: Terminal
) -> TrainResult:
    """Train on the data of an output directory, on the Ray cluster that is connected.

    Args:
        settings: the section ``train:`` of the recipe's settings.
        layout: the output directory, prepared; the caller holds its lock.
        run: the W&B run, which is started.
        terminal: where steps and progress are shown.

    Raises:
        TrainingError: it cannot begin or go on, or a worker failed; a later start goes on from the
            newest checkpoint.
    """
    source, data = find_packs(layout)
    return train_on_cluster(
        "sft", settings, source, data, layout=layout, run=run, terminal=terminal
    )


def find_packs(layout: OutputLayout) -> tuple[PackSource, dict[str, Any]]:
    """Return where the packs of an output directory are, and what tells them from others.

    Raises:
        TrainingError: there is none to train on.
    """
    blend = read_blend(layout)
    training, validation = (
        tuple(
            (layout.root / shard["path"], shard["packs"])
            for shard in blend["splits"].get(name, {"shards": []})["shards"]
        )
        for name in ("train", "valid")
    )
    if not training:
        raise TrainingError(f"{layout.blend} names no pack of the split train")
    data = {"blend_xxh64": blend["xxh64"], "pack_size": blend["pack_size"]}
    return PackSource(training, validation), data
