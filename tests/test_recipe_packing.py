"""Packs hold every token once, have room for what they hold, and are made quickly."""

from __future__ import annotations

import random
import time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.sft.packing import Algorithm, Piece, efficiency, pack

ALGORITHMS = get_args(Algorithm)
FIRST_FIT = [name for name in ALGORITHMS if name != "concatenative"]


def sizes(packs: list[list[Piece]]) -> list[int]:
    return [sum(piece.stop - piece.start for piece in pieces) for pieces in packs]


def naive_first_fit(lengths: list[int], order: list[int], pack_size: int) -> list[list[int]]:
    """First fit as its definition says it, looking at every pack."""
    packs: list[list[int]] = []
    for number in order:
        for found in packs:
            if sum(lengths[other] for other in found) + lengths[number] <= pack_size:
                found.append(number)
                break
        else:
            packs.append([number])
    return packs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(lengths=st.lists(st.integers(1, 20), max_size=60), seed=st.integers(0, 3))
def test_every_token_is_in_one_pack(algorithm: Algorithm, lengths: list[int], seed: int) -> None:
    """No token is lost or there twice, no pack holds too much or nothing."""
    packs = pack(lengths, 20, algorithm, seed)
    tokens = sorted(
        (piece.number, k)
        for pieces in packs
        for piece in pieces
        for k in range(piece.start, piece.stop)
    )
    assert tokens == [(number, k) for number, length in enumerate(lengths) for k in range(length)]
    assert all(0 < size <= 20 for size in sizes(packs))


@pytest.mark.parametrize("algorithm", FIRST_FIT)
@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_first_fit_is_first_fit(algorithm: Algorithm, lengths: list[int]) -> None:
    """The tree finds the pack that a search through all packs finds, and tears nothing."""
    packs = pack(lengths, 20, algorithm, seed=7)
    assert all(
        (piece.start, piece.stop) == (0, lengths[piece.number]) for p in packs for piece in p
    )
    order = list(range(len(lengths)))
    if algorithm == "first_fit_decreasing":
        order.sort(key=lambda number: -lengths[number])
    else:
        random.Random(7).shuffle(order)
    found = [[piece.number for piece in pieces] for pieces in packs]
    assert found == naive_first_fit(lengths, order, 20)


def test_the_seed_decides_the_order_and_nothing_else_does() -> None:
    """A seed gives the same packs each time; another seed gives others."""
    lengths = [random.Random(0).randint(1, 50) for _ in range(200)]
    first, again, other = (pack(lengths, 64, "first_fit_shuffle", seed) for seed in "aab")
    assert first == again
    assert first != other


def test_concatenation_fills_every_pack_but_the_last() -> None:
    """Conversations are cut where a pack is full, and go on in the next one."""
    assert pack([3, 6, 1], 4, "concatenative") == [
        [Piece(0, 0, 3), Piece(1, 0, 1)],
        [Piece(1, 1, 5)],
        [Piece(1, 5, 6), Piece(2, 0, 1)],
    ]


def test_what_does_not_fit_is_refused() -> None:
    """A conversation that is longer than a pack is a mistake of the caller's."""
    with pytest.raises(ValueError, match="conversation 1 has 9 tokens, a pack 8"):
        pack([1, 9], 8, "first_fit_decreasing")


def test_efficiency_is_the_share_that_is_filled() -> None:
    """Tokens by room; nothing packed is nothing wasted."""
    assert efficiency(96, 3, 64) == 0.5
    assert efficiency(0, 0, 64) == 1.0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_hundred_thousand_conversations_take_seconds(algorithm: Algorithm) -> None:
    """Packing is no bottleneck, and leaves little room unused."""
    draw = random.Random(1)
    lengths = [min(int(draw.lognormvariate(5, 1)) + 1, 4096) for _ in range(100_000)]
    began = time.process_time()
    packs = pack(lengths, 4096, algorithm, seed=1)
    assert time.process_time() - began < 10
    assert efficiency(sum(lengths), len(packs), 4096) > 0.97
