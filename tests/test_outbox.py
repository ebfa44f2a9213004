"""The outbox: numbered rows per run, and cursors that start anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raywb.rows import Row, encode, frame
from raywb.service.delivery import Delivery
from raywb.service.fold import Fold
from raywb.service.outbox import Batch, Outbox, OutConfig, OutDefine, OutRow, OutSummary


def row(run: int, value: int) -> OutRow:
    return OutRow(run, float(value), {"x": value})


def filled(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """Two runs' rows in turn, three to a batch, indexed every ten rows."""
    monkeypatch.setattr(Outbox, "INDEX_EVERY_ROWS", 10)
    outbox = Outbox(directory)
    for start in range(0, 300, 3):
        items = [row(1 + number % 2, number // 2) for number in range(start, start + 3)]
        outbox.append(Batch(1, 0, [], [*items, OutConfig(1, {"at": start})]))
    return outbox


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 77, 149])
@pytest.mark.parametrize("run", [1, 2])
def test_a_cursor_starts_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int, start: int
) -> None:
    """Reading from any row gives that row and all later ones of the run, with their numbers."""
    outbox = filled(tmp_path, monkeypatch)
    cursor = outbox.cursor(run, start)
    found = []
    while items := outbox.read(cursor, 7):
        found += [(number, item) for number, item in items if number is not None]
    assert found == [(number, row(run, number)) for number in range(start, 150)]
    assert outbox.rows_of(run) == 150


def test_an_index_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After recovery the same cursors are found, without reading from the beginning."""
    before = filled(tmp_path, monkeypatch)
    positions = [before.cursor(1, number).position for number in range(150)]
    before.close()
    after = Outbox(tmp_path)
    assert len(list(after.recover())) == 100
    assert [after.cursor(1, number).position for number in range(150)] == positions
    assert positions[149] > positions[50] > positions[0]


def test_a_cursor_of_a_run_without_rows_is_at_the_end(tmp_path: Path) -> None:
    """A run that has nothing yet has an empty cursor, which sees what comes."""
    outbox = Outbox(tmp_path)
    cursor = outbox.cursor(3, 0)
    assert outbox.read(cursor, 10) == []
    outbox.append(Batch(3, 0, [], [row(3, 0)]))
    assert outbox.read(cursor, 10) == [(0, row(3, 0))]
    assert outbox.read(cursor, 10) == []


def test_a_full_disk_delays_the_outbox_and_loses_nothing(tmp_path: Path) -> None:
    """A batch that could not be written is written first at the next try, once."""
    delivery = Delivery(tmp_path)
    delivery.open_run(1)
    for number in range(3):
        data = frame(encode(Row(0, 0.0, None, {"x": number})))
        delivery.ledger.append("a" * 32, number * len(data), data)
    log = delivery.outbox._log
    kept = os.dup(log._fd)
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._fd)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            delivery.advance(None)
    os.dup2(kept, log._fd)
    assert delivery.advance(None)
    items = delivery.outbox.read(delivery.outbox.cursor(1, 0), 10)
    assert [item.metrics["x"] for _, item in items if isinstance(item, OutRow)] == [0, 1, 2]


def test_the_fold_is_the_run_so_far() -> None:
    """Config, definitions, last values and aggregates are those of an uninterrupted run."""
    fold = Fold()
    for item in [
        OutConfig(1, {"a": 1, "b": 2}),
        OutConfig(1, {"b": 3}),
        OutDefine(1, "loss", "step", "min,mean"),
        OutDefine(1, "acc", None, "max"),
        OutDefine(1, "train/*", None, "first,last"),
        OutDefine(1, "quiet", None, "none"),
        OutRow(1, 0.0, {"loss": 3.0, "acc": 0.9, "step": 1}),
        OutRow(1, 0.0, {"loss": float("nan"), "step": 2}),
        OutRow(1, 0.0, {"loss": 1.0, "acc": 0.5, "note": "x"}),
        OutSummary(1, {"note": "y", "early": 1}),
        OutRow(1, 0.0, {"train/x": 1, "quiet": 5, "early": 2}),
        OutRow(1, 0.0, {"train/x": 4}),
    ]:
        fold.apply(item)
    assert fold.config == {"a": 1, "b": 3}
    assert list(fold.defines) == ["loss", "acc", "train/*", "quiet"]
    assert fold.summary() == {
        "loss": {"min": 1.0, "mean": 2.0},
        "acc": {"max": 0.9},
        "step": 2,
        "note": "y",
        "early": 2,
        "train/x": {"first": 1, "last": 4},
    }
