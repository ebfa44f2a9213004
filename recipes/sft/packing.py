"""Packing: conversations of many lengths into packs of one, so that little of a batch is padding.

    first_fit_decreasing   the longest first, each into the first pack that has room for it
    first_fit_shuffle      the same in an order drawn by a seed: packs that are less alike
    concatenative          end to end, cut every ``pack_size`` tokens: no room is left, but
                           conversations are torn, and the part behind a cut has lost its beginning

The same lengths, size and seed give the same packs. First fit looks for room in a tree of the
packs' remaining room, so that n conversations take about n · log n steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Algorithm", "Piece", "efficiency", "pack"]

Algorithm = Literal["first_fit_decreasing", "first_fit_shuffle", "concatenative"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start`` to ``stop`` of the conversation with this number."""

    number: int
    start: int
    stop: int


def pack(
    lengths: Sequence[int], pack_size: int, algorithm: Algorithm, seed: str | int = 0
) -> list[list[Piece]]:
    """Distribute conversations over packs.

    Args:
        lengths: Tokens of each conversation, at least 1; at most ``pack_size``, unless they are
            concatenated.
        pack_size: Tokens that a pack has room for.
        algorithm: How.
        seed: What ``first_fit_shuffle`` draws its order by.

    Returns:
        The packs, each with its pieces in order; every token of every conversation is in one.
    """
    if algorithm == "concatenative":
        return list(_concatenated(lengths, pack_size))
    order = list(range(len(lengths)))
    if algorithm == "first_fit_shuffle":
        random.Random(seed).shuffle(order)
    else:
        order.sort(key=lambda number: -lengths[number])
    return _first_fit(lengths, order, pack_size)


def efficiency(tokens: int, packs: int, pack_size: int) -> float:
    """Return which share of the packs' room is filled, 0 to 1; 1 where there are no packs."""
    return tokens / (packs * pack_size) if packs else 1.0


def _first_fit(lengths: Sequence[int], order: Iterable[int], pack_size: int) -> list[list[Piece]]:
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    # A node holds the most room of the packs below it; leaf k, at leaves + k, is pack k.
    room = [pack_size] * (2 * leaves)
    packs: list[list[Piece]] = []
    for number in order:
        length = lengths[number]
        if length > pack_size:
            raise ValueError(f"conversation {number} has {length} tokens, a pack {pack_size}")
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(Piece(number, 0, length))
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


def _concatenated(lengths: Sequence[int], pack_size: int) -> Iterator[list[Piece]]:
    pieces: list[Piece] = []
    room = pack_size
    for number, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            pieces.append(Piece(number, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield pieces
                pieces, room = [], pack_size
    if pieces:
        yield pieces
