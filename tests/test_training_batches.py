"""Batches are the ones that seed and step name, and hold what the data hold."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from training_case import CONTEXT, settings, write_data, write_packs

from recipes.errors import TrainingError
from recipes.pretrain.indexed_dataset import IndexedDataset
from recipes.pretrain.train import WindowSource, find_windows
from recipes.sft.train import find_packs
from recipes.stages.layout import OutputLayout, write_json
from recipes.training.batches import (
    IGNORED,
    Order,
    Pack,
    Shuffle,
    batch_of_packs,
    places_of_rank,
)
from recipes.training.launch import read_blend


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_a_shuffle_is_a_permutation(size: int) -> None:
    """Each number of the range comes once, whatever the size; another key gives another order."""
    shuffled = list(Shuffle(size, 1, 2))
    assert sorted(shuffled) == list(range(size))
    assert list(Shuffle(size, 1, 2)) == shuffled
    if size >= 16:
        assert shuffled != list(range(size))
        assert list(Shuffle(size, 1, 3)) != shuffled


def test_a_shuffle_leaves_nothing_near_its_place() -> None:
    """Neighbours are as far apart as in a random order: a third of the size, on average."""
    shuffled = list(Shuffle(10_000, 5))
    jumps = [abs(one - two) for one, two in itertools.pairwise(shuffled)]
    assert sum(jumps) / len(jumps) == pytest.approx(10_000 / 3, rel=0.05)


def test_an_epoch_has_every_sample_once() -> None:
    """The order goes on for ever; each epoch is another permutation."""
    order = Order(10, seed=3)
    epochs = [[order[place] for place in range(10 * epoch, 10 * epoch + 10)] for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order[0] == epochs[0][0], "an earlier place after a later one"


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_batch_of_a_step_is_the_same_for_any_number_of_workers(world_size: int) -> None:
    """The ranks' shares, put together, are the places of the step, and steps follow each other."""
    for step in (1, 2, 7):
        shares = [list(places_of_rank(step, 6, rank, world_size)) for rank in range(world_size)]
        assert list(itertools.chain(*shares)) == list(range((step - 1) * 6, step * 6))


def source(layout: OutputLayout, share: float) -> WindowSource:
    return find_windows(settings(validation_share=share), layout)[0]


def test_windows_are_the_stream_cut_up(tmp_path: Path) -> None:
    """Each window of each shard once, as the documents' tokens follow each other, with a target."""
    layout = write_data(tmp_path)
    expected = Counter[tuple[int, ...]]()
    for shard in read_blend(layout)["shards"]:
        dataset = IndexedDataset(layout.root / shard["prefix"])
        stream = np.concatenate(list(dataset))
        for begin in range(0, len(stream) - CONTEXT, CONTEXT):
            expected[tuple(stream[begin : begin + CONTEXT + 1])] += 1
    training, validation = source(layout, 0.1).open(seed=1)
    found = Counter[tuple[int, ...]]()
    for samples in (training, validation):
        batch = samples.batch(range(samples.size))
        assert batch.tokens == batch.targets.size == samples.size * CONTEXT
        assert (batch.input_ids[:, 1:] == batch.targets[:, :-1]).all()
        for row, target in zip(batch.input_ids, batch.targets[:, -1], strict=True):
            found[(*row, target)] += 1
    assert found == expected
    assert validation.size == round(0.1 * (training.size + validation.size))


def test_validation_is_kept_apart_and_can_be_nothing(tmp_path: Path) -> None:
    """The last windows of each shard are in no epoch of the training; a share of 0 keeps none."""
    layout = write_data(tmp_path)
    training, validation = source(layout, 0.2).open(seed=1)
    assert {first + size for first, size in _ranges(training)} == {
        first for first, _ in _ranges(validation)
    }
    training, validation = source(layout, 0.0).open(seed=1)
    assert (validation.size, training.size > 0) == (0, True)


def _ranges(samples: object) -> list[tuple[int, int]]:
    begins = samples._begins  # type: ignore[attr-defined]
    sizes = [after - before for before, after in itertools.pairwise(begins)]
    return list(zip(samples._firsts, sizes, strict=True))  # type: ignore[attr-defined]


def test_another_seed_gives_another_order_of_the_same_windows(tmp_path: Path) -> None:
    """The samples of a place depend on the seed, and on nothing else."""
    layout = write_data(tmp_path)
    places = range(20)
    one, same, other = (
        source(layout, 0.1).open(seed=seed)[0].batch(places).input_ids for seed in (1, 1, 2)
    )
    assert (one == same).all()
    assert (one != other).any()


def test_packs_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Each pack of a split comes once in an epoch, with its ids, its mask and its beginnings."""
    layout = write_packs(tmp_path)
    opened, valid = find_packs(layout)[0].open(seed=4)
    assert (opened.size, valid.size) == (21, 4)
    first, second = (
        [tuple(opened._pack(place).input_ids) for place in range(begin, begin + 21)]
        for begin in (0, 21)
    )
    assert Counter(first) == Counter(second)
    assert len(set(first)) == 21
    assert first != second
    pack = opened._pack(0)
    assert len(pack.input_ids) == len(pack.loss_mask)
    assert list(pack.starts[:1]) == [0]
    assert set(pack.loss_mask) == {0, 1}


def test_data_that_cannot_be_trained_on_are_told(tmp_path: Path) -> None:
    """Too few tokens for a window, other weights than tokens, no pack, no blend: each is said."""
    layout = write_data(tmp_path / "pretrain")
    with pytest.raises(TrainingError, match=r"not one window of .*context_tokens=100000"):
        find_windows(settings(context_tokens=100_000), layout)
    blend = json.loads(layout.blend.read_bytes())
    blend["blend"][0] = "7"
    write_json(layout.blend, blend)
    with pytest.raises(TrainingError, match="something else than their tokens"):
        find_windows(settings(), layout)
    packs = write_packs(tmp_path / "sft")
    write_json(packs.blend, {"splits": {}, "pack_size": 8})
    with pytest.raises(TrainingError, match="no pack of the split train"):
        find_packs(packs)
    packs.blend.unlink()
    with pytest.raises(TrainingError, match=r"blend\.json cannot be read"):
        find_packs(packs)


def test_a_pack_becomes_targets_positions_and_segments() -> None:
    """What is masked is no target, nor is a conversation's first token; padding is segment 0."""
    pack = Pack(
        input_ids=np.array([10, 11, 12, 20, 21, 22], np.int32),
        loss_mask=np.array([1, 0, 1, 1, 1, 0], np.uint8),
        starts=np.array([0, 3], np.int32),
    )
    short = Pack(np.array([30, 31]), np.array([0, 1]), np.array([0]))
    batch = batch_of_packs([pack, short])
    no = IGNORED
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [30, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[no, 12, no, 21, no], [31, no, no, no, no]]
    assert batch.positions is not None
    assert batch.segments is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    assert batch.tokens == 6


def test_a_mask_holds_for_any_pack() -> None:
    """Targets are exactly the masked tokens that are no conversation's first, at random packs."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = np.random.default_rng(seed)
    for _ in range(50):
        length = int(chance.integers(2, 40))
        starts = np.unique(np.append(chance.integers(0, length, 3), 0))
        pack = Pack(chance.integers(0, 99, length), chance.integers(0, 2, length), starts)
        targets = batch_of_packs([pack]).targets[0]
        wanted = {place for place in range(1, length) if pack.loss_mask[place]} - {*starts.tolist()}
        assert {place + 1 for place in np.flatnonzero(targets != IGNORED)} == wanted
        assert all(targets[place - 1] == pack.input_ids[place] for place in wanted)
