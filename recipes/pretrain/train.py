"""Pretraining: windows of the token stream that data preparation wrote.

    shards, in the order of blend.json: all documents of a shard, end to end
      → cut into windows of context_tokens, each with the token behind it
      → the last windows of each shard are for validation, the others to train on
      → a small GPT, data-parallel on the cluster's workers (recipes/training)

Every window is seen once in an epoch, so each shard weighs what it has in tokens; a
``blend.json`` that says otherwise is refused.
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
import numpy.typing as npt

from recipes.errors import TrainingError
from recipes.pretrain.indexed_dataset import IndexedDataset
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal
from recipes.tracking import TrackedRun
from recipes.training.batches import Batch, Order, batch_of_windows
from recipes.training.launch import TrainResult, read_blend, train_on_cluster
from recipes.training.settings import PretrainTrainSettings

__all__ = ["WindowSource", "find_windows", "train"]

#: Shards that are mapped into memory at a time; each takes an open file.
_OPEN_SHARDS = 256


@dataclass(frozen=True)
class _Shard:
    """A dataset, and how many of its windows are to train on; the rest are for validation."""

    prefix: Path
    windows: int
    training: int


class _Windows:
    """Some windows of each shard, in an endless order."""

    def __init__(
        self, shards: Sequence[_Shard], context_tokens: int, seed: int, *, validation: bool
    ) -> None:
        self._shards = shards
        self._context_tokens = context_tokens
        self._firsts = [shard.training if validation else 0 for shard in shards]
        counts = [
            shard.windows - shard.training if validation else shard.training for shard in shards
        ]
        self._begins = [0, *itertools.accumulate(counts)]
        self._order = Order(self.size, seed)
        self._open = functools.lru_cache(_OPEN_SHARDS)(IndexedDataset)

    @property
    def size(self) -> int:
        """Windows of all shards."""
        return self._begins[-1]

    def batch(self, places: Sequence[int]) -> Batch:
        """Read the windows of these places of the order."""
        return batch_of_windows([self._window(self._order[place]) for place in places])

    def _window(self, number: int) -> npt.NDArray[np.integer]:
        index = bisect_right(self._begins, number) - 1
        window = self._firsts[index] + number - self._begins[index]
        begin = window * self._context_tokens
        return self._open(self._shards[index].prefix).span(begin, begin + self._context_tokens + 1)


@dataclass(frozen=True)
class WindowSource:
    """Cuts the shards into windows.

    Attributes:
        shards: path of each without ending, and its tokens.
        validation_share: which part of each shard's windows is kept for validation.
    """

    shards: tuple[tuple[Path, int], ...]
    context_tokens: int
    validation_share: float

    def open(self, seed: int) -> tuple[_Windows, _Windows]:
        """Open the windows to train on and those to validate with."""
        shards = self._divided()
        return (
            _Windows(shards, self.context_tokens, seed, validation=False),
            _Windows(shards, self.context_tokens, seed, validation=True),
        )

    def _divided(self) -> list[_Shard]:
        """Divide each shard's windows; shares of a window are carried on to the next shard."""
        divided = []
        before = 0
        owed = 0.0
        for prefix, tokens in self.shards:
            windows = max(tokens - 1, 0) // self.context_tokens
            owed += windows * self.validation_share
            validation = min(int(owed + 0.5) - before, windows)
            before += validation
            divided.append(_Shard(prefix, windows, windows - validation))
        return divided


def train(
    settings: PretrainTrainSettings, layout: OutputLayout, run: TrackedRun, terminal: Terminal
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
    source, data = find_windows(settings, layout)
    return train_on_cluster(
        "pretrain", settings, source, data, layout=layout, run=run, terminal=terminal
    )


def find_windows(
    settings: PretrainTrainSettings, layout: OutputLayout
) -> tuple[WindowSource, dict[str, Any]]:
    """Return where the windows of an output directory are, and what tells them from others.

    Raises:
        TrainingError: there is none to train on, or the blend's weights are no numbers of tokens.
    """
    blend = read_blend(layout)
    shards = tuple((layout.root / shard["prefix"], shard["tokens"]) for shard in blend["shards"])
    if [float(weight) for weight in blend["blend"][::2]] != [tokens for _, tokens in shards]:
        raise TrainingError(
            f"{layout.blend} weighs its shards by something else than their tokens, which this "
            "training does not do; data preparation writes it anew"
        )
    source = WindowSource(shards, settings.context_tokens, settings.validation_share)
    training, _ = source.open(settings.seed)
    if not training.size:
        raise TrainingError(
            f"the data have {blend['tokens']:,} tokens in {len(shards)} shards, which is not one "
            f"window of train.context_tokens={settings.context_tokens} to train on: set fewer"
        )
    data = {
        "blend_xxh64": blend["xxh64"],
        "context_tokens": settings.context_tokens,
        "validation_share": settings.validation_share,
    }
    return source, data
