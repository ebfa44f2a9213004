"""How the values of several ranks at one step become one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from raywb.rows import Scalar

__all__ = ["combined"]

_COMBINE: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max, "sum": sum}


def combined(kind: str, values: list[Scalar]) -> Scalar:
    """One value of many; of texts, which cannot be added up, the lowest rank's.

    Args:
        kind: ``mean``, ``min``, ``max`` or ``sum``; see :data:`raywb.rows.ACROSS_RANKS`.
        values: in the order of the ranks, at least one.
    """
    numbers = cast("list[float]", values)
    try:
        total = sum(numbers)
    except TypeError:
        return values[0]
    if kind not in _COMBINE:
        return total / len(values)
    if total != total:
        return math.nan
    found = _COMBINE[kind](numbers)
    # msgpack, and W&B, take integers of 64 bits.
    return float(found) if isinstance(found, int) and found.bit_length() > 63 else found
