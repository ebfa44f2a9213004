"""What may be logged, and how it becomes plain: floats, ints, bools and strings."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from raywb.device_values import is_on_device
from raywb.rows import Scalar

__all__ = ["Refusal", "flatten", "plain"]

#: Integers beyond 64 bits have no place in msgpack; W&B charts them as floats anyway.
_INT_RANGE = (-(2**63), 2**64 - 1)

#: Deepest nesting of dicts that is joined into one key.
MAX_DEPTH = 16

#: Deepest nesting of a config; what lies deeper becomes dots.
MAX_CONFIG_DEPTH = 64


class Refusal(NamedTuple):
    """A value that W&B cannot chart: its key, its type's name, and why."""

    key: str
    type_name: str
    why: str


def flatten(
    metrics: Mapping[Any, Any], on_device: dict[str, Any] | None = None
) -> tuple[dict[str, Scalar], list[Refusal]]:
    """Make a flat dict of scalars; nested dicts join their keys with a slash.

    numpy and torch scalars (and arrays of one element) become Python's, a member of an
    enumeration becomes its value. NaN and infinities stay
    as they are. What is refused does not keep the rest from being taken.

    Args:
        metrics: the values.
        on_device: gets the tensors that lie on a device, by key; the row has NaN in their place.
            Without it they are asked for their value, which waits for the device.
    """
    row: dict[str, Scalar] = {}
    refused: list[Refusal] = []
    for key, value in _leaves(metrics, "", 0):
        if on_device is not None and is_on_device(value):
            on_device[key] = value
            row[key] = math.nan
            continue
        taken = scalar(value)
        if isinstance(taken, Refusal):
            refused.append(Refusal(key, taken.type_name, taken.why))
        else:
            row[key] = taken
            if on_device:
                on_device.pop(key, None)
    return row, refused


def _leaves(metrics: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        name = prefix + _text(key if isinstance(key, str) else str(key))
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _leaves(value, name + "/", depth + 1)
        else:
            yield name, value


def _text(value: str) -> str:
    """The string as UTF-8 can carry it; lone surrogates become question marks."""
    return value.encode("utf-8", "replace").decode("utf-8")


def scalar(value: Any) -> Scalar | Refusal:
    """One value as a plain scalar, or why not."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _integer(int(value))
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, enum.Enum):
        return scalar(value.value)
    why = "log() takes numbers, bools, strings, and dicts of these"
    if _has_one_element(value):
        try:
            inner = value.item()
        except (RuntimeError, ValueError, TypeError) as error:
            # A tensor without data, or a device that failed.
            inner, why = None, f"it has no value: {error}"
        if isinstance(inner, (bool, int, float, str)):
            return scalar(inner)
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return Refusal("", name, why)


def _integer(value: int) -> Scalar:
    if _INT_RANGE[0] <= value <= _INT_RANGE[1]:
        return value
    if abs(value) < 2**1023:
        return float(value)
    return math.inf if value > 0 else -math.inf


def _has_one_element(value: Any) -> bool:
    """Whether it is a numpy or torch scalar, or an array that holds just one."""
    if not callable(getattr(value, "item", None)):
        return False
    shape = getattr(value, "shape", None)
    return shape is not None and all(size == 1 for size in shape)


def plain(value: Any, depth: int = 0) -> Any:
    """A config value as msgpack can carry it; what has no plain form becomes its text.

    Args:
        value: anything; it may also hold itself.
        depth: how deep in a config it lies.
    """
    if isinstance(value, (Mapping, list, tuple, set, frozenset)) and depth >= MAX_CONFIG_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {_text(str(key)): plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner, depth + 1) for inner in value]
    if value is None:
        return None
    taken = scalar(value)
    return _text(str(value)) if isinstance(taken, Refusal) else taken
