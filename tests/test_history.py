"""The history of a run's series: what is read in columns is what the outbox holds, row by row.

``RAYWB_LONG=1`` tries many more rows.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raywb.service.outbox import Batch, Outbox, OutConfig, OutDefine, OutRow, OutTable
from raywb.view.history import outbox_reader
from raywb.view.history.answers import answer_points, answer_series
from raywb.view.history.columns import THINNING, Points
from raywb.view.history.downsampling import downsample
from raywb.view.history.outbox_reader import OutboxReader
from raywb.view.history.requests import PointsRequest, SeriesRequest

LONG = bool(os.environ.get("RAYWB_LONG"))

Series = dict[tuple[int, str], list[tuple[int, float, float]]]


def truth(directory: Path, runs: list[int]) -> Series:
    """Every number in the outbox as :meth:`Outbox.read` gives it: row number, time, value."""
    outbox = Outbox(directory, read_only=True)
    for _ in outbox.recover():
        pass
    found: Series = defaultdict(list)
    for run in runs:
        cursor = outbox.cursor(run, 0)
        while items := outbox.read(cursor, 1000):
            for number, item in items:
                if isinstance(item, OutRow) and number is not None:
                    for key, value in item.metrics.items():
                        if not isinstance(value, str):
                            found[run, key].append((number, item.time_s, float(value)))
    return dict(found)


def columns(reader: OutboxReader) -> Series:
    """The same, as it was read in columns."""
    found: Series = {}
    for number, run in reader.runs.items():
        for key in run.keys:
            points = run.points(key)
            assert (points.weight == 1).all()
            lists = (array.tolist() for array in (points.rows, points.times, points.low))
            found[number, key] = list(zip(*lists, strict=True))
    return found


def read_all(reader: OutboxReader) -> None:
    if reader.look():
        while reader.read_some():
            pass


def same(one: Series, other: Series) -> bool:
    return repr(sorted(one.items())) == repr(sorted(other.items()))


whole_numbers = st.one_of(
    st.integers(-40, 300), st.integers(-(2**63), 2**64 - 1), st.sampled_from([2**16, 2**32, -129])
)
values = st.one_of(whole_numbers, st.floats(), st.booleans(), st.text(max_size=3))
#: Few kinds of values and keys, so that many rows are of one layout; and some of every kind.
keys = st.sampled_from(["a", "training/loss", "training/step", "k" * 40, "k" * 300, "é", "", "b"])
metrics = st.dictionaries(keys, values, max_size=4)
runs = st.sampled_from([1, 1, 1, 2, 200, 70_000, 1_000_001])
tables = st.none() | st.just(OutTable("t", ["x"], [[1], [None]]))


@st.composite
def series_of_rows(draw: st.DrawFn) -> list[Any]:
    """Rows as one line of code would log them, and others between them."""
    run, first = draw(runs), draw(metrics)
    kinds = [type(value) for value in first.values()]
    of_kind = {int: whole_numbers, float: st.floats(), bool: st.booleans(), str: st.just("abc")}
    alike = st.tuples(*(of_kind[kind] for kind in kinds)).map(
        lambda some: dict(zip(first, some, strict=True))
    )
    rows = st.builds(
        OutRow,
        st.just(run),
        st.floats(0, 2e9),
        st.one_of(alike, alike, alike, metrics),
        st.integers(0, 300),
        st.one_of(st.none(), st.none(), tables),
    )
    others = st.sampled_from([OutConfig(run, {"x": 1}), OutDefine(run, "a", "b", None)])
    return draw(st.lists(st.one_of(rows, rows, rows, others), min_size=1, max_size=20))


@settings(max_examples=3000 if LONG else 60, deadline=None)
@given(data=st.data(), read_bytes=st.sampled_from([64, 2000, 1 << 20]))
def test_columns_hold_what_the_outbox_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, read_bytes: int
) -> None:
    """Any rows, read in any pieces while the log grows, also behind damage: the same numbers."""
    directory = tmp_path_factory.mktemp("outbox")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox_reader, "READ_BYTES", (read_bytes, 4 * read_bytes))
        patch.setattr("raywb.view.history.batch_rows.FEWEST_ROWS", 2)
        outbox = Outbox(directory)
        outbox._log._segment_bytes = 3000
        reader = OutboxReader(directory)
        for batch in data.draw(st.lists(series_of_rows(), min_size=1, max_size=8)):
            outbox.append(Batch(1, 2**40, [], batch))
            if data.draw(st.booleans()):
                read_all(reader)
        outbox.close()
        read_all(reader)
        numbers = [1, 2, 200, 70_000, 1_000_001]
        assert same(columns(reader), truth(directory, numbers))
        damage(directory, data)
        reader = OutboxReader(directory)
        read_all(reader)
        assert same(columns(reader), truth(directory, numbers))


def test_rows_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    """Equally long rows with the same first key, and other keys or types behind it."""
    random = Random(seed := 7)
    print(f"seed {seed}")
    kinds = [
        lambda: random.uniform(-1, 1),
        lambda: random.randrange(2**63, 2**64),
        lambda: -random.randrange(2**40, 2**63),
        lambda: f"{random.randrange(10**7, 10**8)}",
    ]
    outbox = Outbox(tmp_path)
    for _ in range(20):
        rows = []
        for _ in range(200):
            second = random.choice("bcd")
            row = {"a": random.choice(kinds)(), second: random.choice(kinds)(), "x": 0.5}
            rows.append(OutRow(random.choice([1, 2]), random.uniform(0, 1e9), row))
        outbox.append(Batch(1, 0, [], rows))
    outbox.close()
    reader = OutboxReader(tmp_path)
    read_all(reader)
    assert same(columns(reader), truth(tmp_path, [1, 2]))


def damage(directory: Path, data: st.DataObject) -> None:
    """Change one byte somewhere."""
    file = data.draw(st.sampled_from(sorted(directory.glob("*.log"))))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)


def filled(directory: Path, rows: int, per_batch: int = 100) -> OutboxReader:
    """Three stages in turn, each with an axis of its own, and one series without."""
    outbox = Outbox(directory)
    defines = [
        item
        for name in ("a", "b", "c")
        for item in (
            OutDefine(1, f"training/{name}/step", None, None),
            OutDefine(1, f"training/{name}/*", f"training/{name}/step", None, False),
        )
    ]
    outbox.append(Batch(1, 0, [], defines))
    for begin in range(0, rows, per_batch):
        items = []
        for number in range(begin, min(begin + per_batch, rows)):
            stage, step = "abc"[number % 3], number // 3
            prefix = f"training/{stage}/"
            row = {prefix + "loss": math.sin(number), prefix + "step": step}
            items.append(OutRow(1, 1e9 + number, row))
        outbox.append(Batch(1, 0, [], items))
    outbox.close()
    reader = OutboxReader(directory)
    read_all(reader)
    return reader


def test_a_series_is_drawn_over_its_own_axis(tmp_path: Path) -> None:
    """Axes come from exact names and globs; time and row number can be asked for."""
    reader = filled(tmp_path, 300)
    listed = answer_series(reader, SeriesRequest(1))
    assert [one["key"] for one in listed["series"]][:3] == [
        "training/a/loss",
        "training/a/step",
        "training/b/loss",
    ]
    one = listed["series"][2]
    assert one["axis"] == "training/b/step"
    assert one["points"] == 100
    assert one["last"] == math.sin(298)
    assert one["min"] == min(math.sin(n) for n in range(1, 300, 3))
    assert one["max"] == max(math.sin(n) for n in range(1, 300, 3))
    assert one["time_s"] == 1e9 + 298
    assert listed["series"][3]["axis"] is None  # an axis has none itself
    assert (listed["rows_read"], listed["rows_total"]) == (300, 300)
    for x, expected in [
        ("axis", [float(n) for n in range(10, 21)]),
        ("time", [1e9 + 1 + 3 * n for n in range(10, 21)]),
        ("row", [1.0 + 3 * n for n in range(10, 21)]),
    ]:
        asked = PointsRequest(1, ["training/b/loss"], 600, expected[0], expected[-1], x)
        got = answer_points(reader, asked)["series"]["training/b/loss"]
        assert got["x"] == expected
        assert (
            got["min"] == got["max"] == got["mean"] == [math.sin(1 + 3 * n) for n in range(10, 21)]
        )
        assert got["last"] == math.sin(61)
        assert got["points"] == 11
        assert got["axis"] == ("training/b/step" if x == "axis" else None)


def test_a_row_without_its_axis_is_drawn_as_wandb_draws_it(tmp_path: Path) -> None:
    """It has the axis' last value where W&B puts that in, and is left out where it does not."""
    outbox = Outbox(tmp_path)
    rows = [{"y": 0.0}, {"epoch": 5}, {"y": 1.0, "z": 1.0}, {"y": 2.0, "z": 2.0, "epoch": 7}]
    items = [OutDefine(1, "y", "epoch", None), OutDefine(1, "z*", "epoch", None, False)]
    outbox.append(Batch(1, 0, [], [*items, *(OutRow(1, 0.0, row) for row in rows)]))
    outbox.close()
    reader = OutboxReader(tmp_path)
    read_all(reader)
    got = answer_points(reader, PointsRequest(1, ["y", "z", "nothing"]))["series"]
    assert set(got) == {"y", "z"}
    assert (got["y"]["x"], got["y"]["mean"]) == ([5.0, 7.0], [1.0, 2.0])
    assert (got["z"]["x"], got["z"]["mean"]) == ([7.0], [2.0])


finite = st.floats(-1e9, 1e9)
some_values = st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.one_of(finite, st.integers(0, 9).map(float)), some_values), max_size=60),
    st.integers(1, 20),
)
def test_buckets_keep_least_and_greatest(pairs: list[tuple[float, float]], limit: int) -> None:
    """However the steps lie: x ascends, no value is lost, and every extreme is seen."""
    x = np.array([one for one, _ in pairs], float)
    y = np.array([value for _, value in pairs], float)
    rows = np.arange(len(pairs))
    got = downsample(x, Points(rows, x, y, y, y, np.ones(len(y))), limit, None, None)
    assert got.x == sorted(got.x)
    assert got.points == len(pairs)
    ordered = [value for _, value in sorted(pairs, key=lambda pair: pair[0])]
    assert repr(got.last) == repr(ordered[-1] if ordered else None)
    if len(pairs) <= limit:
        assert repr(got.mean) == repr(ordered) == repr(got.low) == repr(got.high)
        return
    assert len(got.x) <= limit
    good = [value for value in ordered if math.isfinite(value)]
    low = [value for value in got.low if math.isfinite(value)]
    high = [value for value in got.high if math.isfinite(value)]
    assert bool(good) == bool(low) == bool(high)
    if good:
        assert (min(low), max(high)) == (min(good), max(good))
        for least, mean, most in zip(got.low, got.mean, got.high, strict=True):
            assert math.isnan(mean) or least <= mean <= most


def test_memory_is_bounded_and_extremes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond its limit the oldest rows are thinned, the answer says so, and no extreme is lost."""
    monkeypatch.setattr("raywb.view.history.columns.BLOCK_ROWS", (64, 512))
    filled(tmp_path, 60_000, 1000)
    outbox = Outbox(tmp_path)
    for _ in outbox.recover():
        pass
    outbox.append(
        Batch(1, 0, [], [OutRow(1, 1e9, {"training/a/loss": -9.0, "training/a/step": 20_000})])
    )
    outbox.close()
    whole, bounded = OutboxReader(tmp_path), OutboxReader(tmp_path, memory_bytes=600_000)
    read_all(whole)
    read_all(bounded)
    assert whole.run(1).nbytes > 1_200_000
    assert bounded.run(1).nbytes < 620_000
    asked = PointsRequest(1, ["training/a/loss", "training/b/loss"], 50)
    one, other = answer_points(whole, asked), answer_points(bounded, asked)
    assert one["rows_thinned"] == 0
    assert 20_000 < other["rows_thinned"] < 60_000
    for key in asked.keys:
        exact, thinned = one["series"][key], other["series"][key]
        assert thinned["points"] == exact["points"]
        assert min(thinned["min"]) == min(exact["min"])
        assert max(thinned["max"]) == max(exact["max"])
        assert thinned["min"][-5:] == exact["min"][-5:]
        assert thinned["x"][-1] == pytest.approx(exact["x"][-1], abs=THINNING)
    assert (
        answer_series(bounded, SeriesRequest(1))["series"]
        == answer_series(whole, SeriesRequest(1))["series"]
    )


def test_many_sets_of_keys_are_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that each have other keys are read as well, within a bound of tables."""
    monkeypatch.setattr("raywb.view.history.run_history.MAX_TABLES", 5)
    outbox = Outbox(tmp_path)
    rows = [
        OutRow(1, float(n), {f"k{n % 7}": n, f"k{n % 11 + 7}": -n, "all": n}) for n in range(200)
    ]
    outbox.append(Batch(1, 0, [], rows))
    outbox.close()
    reader = OutboxReader(tmp_path)
    read_all(reader)
    assert same(columns(reader), truth(tmp_path, [1]))
