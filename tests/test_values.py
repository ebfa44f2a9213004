"""What log() takes, and what it refuses by name."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raywb.values import flatten, plain

#: The lane for the newest cosmos-xenna has no torch; the first one always does.
torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (1.5, 1.5),
        (7, 7),
        (True, True),
        ("text", "text"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.float16(2.0), 2.0),
        (np.array(4.0), 4.0),
        (np.array([[5]]), 5),
        (np.str_("s"), "s"),
        (torch.tensor(0.25), 0.25),
        (torch.tensor([3]), 3),
        (torch.tensor(2.0, dtype=torch.bfloat16), 2.0),
        (torch.tensor(1.0, requires_grad=True), 1.0),
        (2**64, float(2**64)),
        (-(2**70), -float(2**70)),
        (10**400, math.inf),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        ("\ud800", "?"),
    ],
)
def test_scalars_become_plain(given: Any, taken: Any) -> None:
    """Python, numpy and torch scalars become plain ones of the same kind and value."""
    row, refused = flatten({"x": given})
    assert refused == []
    assert row == {"x": taken}
    assert type(row["x"]) is type(taken)


def test_nan_stays_nan() -> None:
    """NaN is a value like any other."""
    row, _ = flatten({"x": math.nan, "y": np.float32("nan")})
    assert all(math.isnan(value) for value in row.values())


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, "NoneType"),
        ([1], "list"),
        ((1,), "tuple"),
        (b"b", "bytes"),
        (1j, "complex"),
        (Decimal(1), "decimal.Decimal"),
        (np.array([1, 2]), "numpy.ndarray"),
        (np.array([]), "numpy.ndarray"),
        (torch.zeros(2), "torch.Tensor"),
        (np.complex64(1), "numpy.complex64"),
        (object(), "object"),
    ],
)
def test_the_rest_is_refused_by_name(given: Any, name: str) -> None:
    """What W&B cannot chart is refused with its key and type, and costs nothing else."""
    row, refused = flatten({"a": {"bad": given}, "good": 1})
    assert row == {"good": 1}
    assert [(item.key, item.type_name) for item in refused] == [("a/bad", name)]


def test_nested_dicts_join_with_slashes() -> None:
    """Dicts in dicts become one level, keys that are no strings become text."""
    row, refused = flatten({"a": {"b": {"c": 1}, 2: 3}, 4: 5, "empty": {}})
    assert refused == []
    assert row == {"a/b/c": 1, "a/2": 3, "4": 5}


def test_a_dict_without_end_is_refused() -> None:
    """A dict that contains itself does not take the process with it."""
    endless: dict[str, Any] = {"x": 1}
    endless["self"] = endless
    row, refused = flatten(endless)
    assert row["x"] == 1
    assert len(refused) == 1


def test_config_values_become_plain() -> None:
    """A config may hold anything: lists and mappings stay, the rest becomes text."""
    assert plain(
        {"a": (1, np.int32(2)), "path": Path("/x"), "none": None, 3: {"t": torch.float32}}
    ) == {"a": [1, 2], "path": "/x", "none": None, "3": {"t": "torch.float32"}}


def test_a_config_without_end_ends() -> None:
    """A config that holds itself, or is nested very deep, becomes dots where it is too deep."""
    endless: dict[str, object] = {"x": 1}
    endless["self"] = endless
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, deep):
        text = json.dumps(plain(value))
        assert "..." in text
        assert len(text) < 10_000
