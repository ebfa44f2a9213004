"""The merge: names, axes and series; and the same result however often it is interrupted."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from raywb.rows import (
    Channel,
    ConfigUpdate,
    Counters,
    Define,
    End,
    Hello,
    Message,
    Row,
    SummaryUpdate,
    encode,
    frame,
)
from raywb.service.delivery import Delivery
from raywb.service.merge import Merge
from raywb.service.outbox import Item, OutConfig, OutDefine, OutRow, OutSummary

A = "a" * 32
B = "b" * 32


def stream(*messages: Message) -> bytes:
    return b"".join(frame(encode(message)) for message in messages)


def items_of(*messages: Message, source_id: str = A, merge: Merge | None = None) -> list[Item]:
    """What the messages of one source become in a first run."""
    merge = merge or Merge()
    merge.open_run(1)
    source = merge.sources.get(source_id)
    batch = merge.consume(source_id, source.consumed if source else 0, stream(*messages), 0)
    assert batch is not None
    return batch.items


def rows_of(items: list[Item]) -> list[dict]:
    return [item.metrics for item in items if isinstance(item, OutRow)]


def test_a_stage_gets_its_own_axis_once() -> None:
    """The first row with a step defines the stage's axis, and metric and step travel as data."""
    items = items_of(
        Channel(0, "training/operator", None, None),
        Row(0, 1.0, 100, {"loss": 0.5}),
        Row(0, 2.0, 90, {"loss": 0.6}),
    )
    assert items == [
        OutDefine(1, "training/operator/step", None, None),
        OutDefine(1, "training/operator/*", "training/operator/step", None, False),
        OutRow(1, 1.0, {"training/operator/loss": 0.5, "training/operator/step": 100}),
        OutRow(1, 2.0, {"training/operator/loss": 0.6, "training/operator/step": 90}),
    ]


def test_a_row_without_a_step_defines_nothing() -> None:
    """Without a step W&B's own row counter is the axis."""
    assert items_of(Channel(0, "eval", None, None), Row(0, 1.0, None, {"x": 1})) == [
        OutRow(1, 1.0, {"eval/x": 1})
    ]


def test_without_a_stage_each_namespace_has_its_axis() -> None:
    """Keys that carry their namespace themselves get its axis; a bare key gets `step`."""
    items = items_of(
        Channel(0, None, None, None), Row(0, 1.0, 7, {"a/b/loss": 1.0, "a/b/lr": 2.0, "acc": 3.0})
    )
    assert [item for item in items if isinstance(item, OutDefine)] == [
        OutDefine(1, "a/b/step", None, None),
        OutDefine(1, "a/b/*", "a/b/step", None, False),
        OutDefine(1, "step", None, None),
        OutDefine(1, "acc", "step", None, False),
    ]
    assert rows_of(items) == [
        {"a/b/loss": 1.0, "a/b/lr": 2.0, "acc": 3.0, "a/b/step": 7, "step": 7}
    ]


def test_the_users_timestamp_is_the_rows_time() -> None:
    """A `_timestamp` among the values replaces the client's clock, and is no metric."""
    (row,) = items_of(
        Channel(0, "s", None, None), Row(0, 1.0, None, {"x": 1, "_timestamp": 1234.5})
    )
    assert row == OutRow(1, 1234.5, {"s/x": 1})


def test_config_summary_and_definitions_get_full_names() -> None:
    """Summary and definitions carry the stage; config does not."""
    assert items_of(
        Channel(0, "s", None, None),
        ConfigUpdate(0, {"lr": 0.1}),
        SummaryUpdate(0, {"best": 3}),
        Define(0, "loss", "epoch", "min"),
    ) == [
        OutConfig(1, {"lr": 0.1}),
        OutSummary(1, {"s/best": 3}),
        OutDefine(1, "s/loss", "s/epoch", "min"),
    ]


def test_series_of_one_namespace_do_not_mix() -> None:
    """The first series gets the namespace, later ones a numbered name, in order of first row."""
    merge = Merge()
    opened = Channel(0, "xenna", None, None, "sft", "t")
    first = items_of(opened, Row(0, 1.0, None, {"t": 0}), merge=merge)
    second = items_of(opened, Row(0, 1.0, None, {"t": 0}), source_id=B, merge=merge)
    third = items_of(
        Channel(1, "xenna", None, None, "pretrain", "t"),
        Row(1, 1.0, None, {"t": 0}),
        Row(0, 1.0, None, {"t": 1}),
        merge=merge,
    )
    assert rows_of(first) == [{"xenna/t": 0}]
    assert OutDefine(1, "xenna/*", "xenna/t", None, False) in first
    assert rows_of(second) == [{"xenna/sft_2/t": 0}]
    assert OutDefine(1, "xenna/sft_2/*", "xenna/sft_2/t", None, False) in second
    assert rows_of(third) == [{"xenna/pretrain_3/t": 0}, {"xenna/t": 1}]


def test_a_namespace_within_another_keeps_its_axis() -> None:
    """Where one namespace's glob covers another's keys, these are defined by their full names."""
    merge = Merge()
    opened = [Channel(0, "a/b", None, None), Channel(1, "a", None, None)]
    first = items_of(*opened, Row(0, 1.0, 1, {"x": 0}), merge=merge)
    assert [item.name for item in first if isinstance(item, OutDefine)] == ["a/b/step", "a/b/*"]
    second = items_of(
        Row(1, 1.0, 1, {"y": 0}), Row(0, 1.0, 2, {"x": 0}), Row(0, 1.0, 3, {"x": 0}), merge=merge
    )
    assert [item for item in second if isinstance(item, OutDefine)] == [
        OutDefine(1, "a/step", None, None),
        OutDefine(1, "a/*", "a/step", None, False),
        OutDefine(1, "a/b/x", "a/b/step", None, False),
    ]


def test_what_the_user_defined_stays() -> None:
    """A definition of the user's is never followed by one of ours for the same name."""
    items = items_of(
        Channel(0, "s", None, None),
        Define(0, "*", "epoch", "max"),
        Row(0, 1.0, 1, {"x": 0}),
    )
    assert [item for item in items if isinstance(item, OutDefine)] == [
        OutDefine(1, "s/*", "s/epoch", "max"),
        OutDefine(1, "s/step", None, None),
    ]


def test_a_definition_without_an_axis_gets_the_stages() -> None:
    """W&B would chart a metric that is defined by name, and without an axis, on its own counter."""
    items = items_of(
        Channel(0, "s", None, None),
        Define(0, "best", None, "max"),
        Define(0, "lr", None, None, "last"),
        Row(0, 1.0, 1, {"best": 0, "lr": 1}),
        Row(0, 1.0, 2, {"best": 0, "lr": 1}),
    )
    assert [item for item in items if isinstance(item, OutDefine)] == [
        OutDefine(1, "s/best", None, "max"),
        OutDefine(1, "s/step", None, None),
        OutDefine(1, "s/*", "s/step", None, False),
        OutDefine(1, "s/best", "s/step", "max", False),
    ]


def test_adjacent_rows_of_one_step_become_one() -> None:
    """Rows that follow each other at one step, without a key in common, are one row of the run."""
    items = items_of(
        Channel(0, "s", None, None),
        Channel(1, "t", None, None),
        Row(0, 1.0, 1, {"x": 0}),
        Row(0, 2.0, 1, {"y": 1}),
        Row(0, 3.0, 1, {"x": 2}),
        Row(1, 3.0, 1, {"x": 3}),
        Row(1, 4.0, None, {"y": 4}),
        Row(1, 5.0, None, {"z": 5}),
    )
    assert [item for item in items if isinstance(item, OutRow)] == [
        OutRow(1, 2.0, {"s/x": 0, "s/step": 1, "s/y": 1}, logged=2),
        OutRow(1, 3.0, {"s/x": 2, "s/step": 1}),
        OutRow(1, 3.0, {"t/x": 3, "t/step": 1}),
        OutRow(1, 4.0, {"t/y": 4}),
        OutRow(1, 5.0, {"t/z": 5}),
    ]


def test_a_new_run_begins_anew() -> None:
    """In the next run namespaces are defined again, series count from one, losses from zero."""
    merge = Merge()
    merge.open_run(1)
    opened = Channel(0, "xenna", None, None, "p", "t")
    items_of(opened, Counters(2, {"disk_full": 5}), Row(0, 1.0, None, {"t": 1}), merge=merge)
    assert (merge.lost, merge.rejected, merge.rows) == ({"disk_full": 5}, 2, 1)
    merge.open_run(2)
    assert (merge.lost, merge.rejected, merge.rows) == ({}, 0, 0)
    batch = merge.consume(
        A,
        merge.sources[A].consumed,
        stream(Row(0, 1.0, None, {"t": 2}), Counters(3, {"disk_full": 6})),
        0,
    )
    assert batch is not None
    assert OutDefine(2, "xenna/*", "xenna/t", None, False) in batch.items
    assert rows_of(batch.items) == [{"xenna/t": 2}]
    assert (merge.lost, merge.rejected) == ({"disk_full": 1}, 1)


def test_damage_is_counted_and_costs_its_frame_only() -> None:
    """A damaged frame and a message of no known kind are counted; the rows around them arrive."""
    merge = Merge()
    merge.open_run(1)
    damaged = bytearray(stream(Row(0, 1.0, None, {"x": 1})))
    damaged[-1] ^= 1
    data = (
        stream(Channel(0, "s", None, None), Row(0, 1.0, None, {"x": 0}))
        + bytes(damaged)
        + frame(b"\x93\x63\x01\x02")
        + stream(Row(0, 1.0, None, {"x": 2}))
    )
    batch = merge.consume(A, 0, data, 0)
    assert batch is not None
    assert rows_of(batch.items) == [{"s/x": 0}, {"s/x": 2}]
    assert merge.lost == {"damaged_frames": 2}


def test_a_source_is_known_by_its_hello_and_end() -> None:
    """Who logs, and that it ended in good order, is remembered."""
    merge = Merge()
    hello = Hello(A, "c", "n", 1, 42, "host", 1.0, "0")
    items_of(hello, End(2.0), merge=merge)
    assert merge.sources[A].hello == hello
    assert merge.sources[A].ended


def everything(delivery: Delivery) -> list[Item]:
    cursor = delivery.outbox.cursor(1, 0)
    found = []
    while items := delivery.outbox.read(cursor, 7):
        found += [item for _, item in items]
    return found


@pytest.mark.parametrize("rounds", [25])
def test_interrupted_anywhere_the_outbox_is_the_same(tmp_path: Path, rounds: int) -> None:
    """Restarts at random moments leave the outbox as it would have been without any."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for number in range(rounds):
        sources = {A: _messages(chance), B: _messages(chance)}
        arrivals = _arrivals(chance, sources)
        outboxes = []
        for restarting in (False, True):
            directory = tmp_path / f"{number}-{restarting}"
            delivery = Delivery(directory)
            delivery.open_run(1)
            for source_id, offset, data in arrivals:
                delivery.ledger.append(source_id, offset, data)
                if not restarting or chance.random() < 0.6:
                    delivery.advance(None)
                if restarting and chance.random() < 0.4:
                    delivery.close()
                    delivery = Delivery(directory)
                    delivery.open_run(1)
            delivery.advance(None)
            outboxes.append(everything(delivery))
            assert delivery.merge.rows == sum(
                isinstance(message, Row) for sent in sources.values() for message in sent
            )
            assert delivery.merge.lost == {"disk_full": 2}
        assert outboxes[0] == outboxes[1]


def test_rows_behind_a_ledger_that_lost_its_end_are_delivered(tmp_path: Path) -> None:
    """After a power cut the ledger may be shorter than what the outbox made of it."""
    delivery = Delivery(tmp_path)
    delivery.open_run(1)
    first = stream(Channel(0, "s", None, None), *(Row(0, 1.0, n, {"x": n}) for n in range(20)))
    delivery.ledger.append(A, 0, first)
    delivery.advance(None)
    delivery.close()
    (segment,) = (tmp_path / "ledger").iterdir()
    os.truncate(segment, 0)
    delivery = Delivery(tmp_path)
    delivery.open_run(1)
    assert delivery.ledger.append(A, 0, first) == len(first), "its source sends it again"
    delivery.ledger.append(B, 0, stream(Channel(0, "t", None, None), Row(0, 1.0, 1, {"y": 1})))
    delivery.advance(None)
    delivery.close()
    delivery = Delivery(tmp_path)
    delivery.advance(None)
    found = rows_of(everything(delivery))
    assert [row["s/x"] for row in found if "s/x" in row] == list(range(20))
    assert [row["t/y"] for row in found if "t/y" in row] == [1]
    assert len(found) == 21


def _messages(chance: random.Random) -> list[Message]:
    """A source's life: channels, series, rows, counters."""
    messages: list[Message] = [
        Channel(0, chance.choice(["train", "eval"]), None, None),
        Channel(1, "xenna", None, None, "kind", "t"),
        Counters(0, {"disk_full": 1}),
    ]
    rows = [
        Row(0, float(number), number, {"loss": float(number)})
        if chance.random() < 0.7
        else Row(1, float(number), None, {"t": number})
        for number in range(chance.randrange(5, 40))
    ]
    return messages + rows


def _arrivals(
    chance: random.Random, sources: dict[str, list[Message]]
) -> list[tuple[str, int, bytes]]:
    """The sources' bytes in requests of random size, interleaved, each source in order."""
    queues = {}
    for source_id, messages in sources.items():
        offset = 0
        requests = []
        while messages:
            count = chance.randrange(1, 6)
            data = stream(*messages[:count])
            messages = messages[count:]
            requests.append((source_id, offset, data))
            offset += len(data)
        queues[source_id] = requests
    arrivals = []
    while any(queues.values()):
        source_id = chance.choice([key for key, waiting in queues.items() if waiting])
        arrivals.append(queues[source_id].pop(0))
    return arrivals
