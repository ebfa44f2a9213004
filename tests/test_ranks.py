"""Rows of many ranks at one step become one row: each counts once, however they come."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from local_service import CLUSTER, local_service
from wandb_file import read_runs

from raywb.client import Client
from raywb.rows import (
    ACROSS_RANKS,
    Channel,
    Define,
    End,
    EndChannel,
    Hello,
    Message,
    Row,
    encode,
    frame,
)
from raywb.service import ranks
from raywb.service.delivery import Delivery
from raywb.service.merge import Merge
from raywb.service.outbox import Batch, OutRow
from raywb.service.ranks import Waiting

WAITING = Waiting(passed_s=2.0, silent_s=15.0)


class Ranks:
    """A merge, and sources that send to it one request at a time."""

    def __init__(self) -> None:
        self.merge = Merge()
        self.merge.open_run(1)
        self.now_s = 0.0
        self._ledger_end = 0

    def join(
        self, *members: int, world_size: int = 2, name: str = "", job: str = "", worker: bool = True
    ) -> dict[int, str]:
        """Sources of these ranks, of stage ``t``; ``name`` tells processes of one rank apart."""
        sources = {rank: f"{rank}{name}".rjust(32, "0") for rank in members}
        for rank, source_id in sources.items():
            if job:
                hello = Hello(source_id, "c", "n", 1, 1, "host", 0.0, "0", job, worker)
                self.send(source_id, hello)
            self.send(source_id, Channel(0, "t", rank, world_size))
        return sources

    def send(self, source_id: str, *messages: Message) -> list[dict]:
        """One request; returns the rows that it finished."""
        data = b"".join(frame(encode(message)) for message in messages)
        source = self.merge.sources.get(source_id)
        position, self._ledger_end = self._ledger_end, self._ledger_end + len(data)
        batch = self.merge.consume(
            source_id,
            source.consumed if source else 0,
            data,
            self._ledger_end,
            position=position,
            now_s=self.now_s,
        )
        return rows_of(batch)

    def log(self, source_id: str, step: float, **metrics: object) -> list[dict]:
        return self.send(source_id, Row(0, self.now_s, step, metrics))  # type: ignore[arg-type]

    def after(self, seconds: float) -> list[dict]:
        """Time goes by; returns the rows whose wait is over."""
        self.now_s += seconds
        return rows_of(self.merge.due(self.now_s, WAITING, self._ledger_end))


WHO_WAS_LAST = ("slowest_rank", "rank_spread_s")


def rows_of(batch: Batch | None) -> list[dict]:
    """The rows of a batch, less the stage's name and who was last."""
    found = []
    for item in batch.items if batch else []:
        if isinstance(item, OutRow):
            short = {key.removeprefix("t/"): value for key, value in item.metrics.items()}
            found.append(
                {k: v for k, v in short.items() if k not in ("slowest_rank", "rank_spread_s")}
            )
    return found


def test_one_row_for_all_ranks_of_a_step() -> None:
    """Numbers become their mean, and the row says how many ranks there were."""
    run = Ranks()
    rank = run.join(0, 1)
    assert run.log(rank[0], 1, loss=1.0, text="a") == []
    assert run.log(rank[1], 1, loss=2.0, text="b") == [
        {"loss": 1.5, "text": "a", "ranks": 2, "step": 1}
    ]
    assert run.merge.waiting_rows == 0


def test_who_came_last_is_in_the_row() -> None:
    """The last rank, and how much later than the first it was, by the clients' clocks."""
    run = Ranks()
    rank = run.join(0, 1, 2, world_size=3)
    for number, time_s in ((2, 10.0), (0, 11.0), (1, 14.5)):
        source = run.merge.sources[rank[number]]
        data = frame(encode(Row(0, time_s, 7, {"x": 0})))
        batch = run.merge.consume(rank[number], source.consumed, data, 0)
    assert batch is not None
    (row,) = [item for item in batch.items if isinstance(item, OutRow)]
    assert (row.metrics["t/slowest_rank"], row.metrics["t/rank_spread_s"]) == (1, 4.5)
    assert (row.time_s, row.logged) == (14.5, 3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", {"a/x": 2.0}),
        ("min", {"a/x": 1}),
        ("max", {"a/x": 3}),
        ("sum", {"a/x": 4}),
        ("last", {"a/x": 1}),
        ("per_rank", {"a/x/rank_0": 3, "a/x/rank_1": 1}),
    ],
)
@pytest.mark.parametrize("name", ["a/x", "a/*", "*"])
def test_a_definition_says_how_values_become_one(kind: str, expected: dict, name: str) -> None:
    """By the metric's name or by a glob; without a definition it is the mean."""
    assert kind in ACROSS_RANKS
    run = Ranks()
    rank = run.join(0, 1)
    run.send(rank[0], Define(0, name, None, None, kind))
    run.log(rank[0], 1, **{"a/x": 3})
    run.now_s += 1
    assert run.log(rank[1], 1, **{"a/x": 1}) == [{**expected, "ranks": 2, "step": 1}]


def test_odd_values_stay_what_they_are() -> None:
    """Not a number stays so, infinities add up, and a sum beyond 64 bits is still a number."""
    run = Ranks()
    rank = run.join(0, 1)
    run.send(rank[0], Define(0, "big", None, None, "sum"))
    run.log(rank[0], 1, nan=math.nan, inf=math.inf, big=2**63, flag=True, mixed="a")
    (row,) = run.log(rank[1], 1, nan=1.0, inf=1.0, big=2**63, flag=False, mixed=2)
    assert math.isnan(row.pop("nan"))
    assert row == {
        "inf": math.inf, "big": 2.0**64, "flag": 0.5, "mixed": "a", "ranks": 2, "step": 1
    }  # fmt: skip
    encode(Row(0, 0.0, 1, row))


def test_a_silent_rank_is_waited_for_once() -> None:
    """A rank that never comes holds the first step for the longer time, and no later one."""
    run = Ranks()
    rank = run.join(0, 1, world_size=3)
    run.log(rank[0], 1, x=1)
    run.log(rank[1], 1, x=3)
    assert run.after(14.0) == []
    assert run.after(1.0) == [{"x": 2.0, "ranks": 2, "step": 1}]
    run.log(rank[0], 2, x=1)
    assert run.log(rank[1], 2, x=3) == [{"x": 2.0, "ranks": 2, "step": 2}]
    assert run.merge.late == 0


def test_a_late_rank_gets_a_row_of_its_own_and_is_counted() -> None:
    """What comes after its step was finished is a further row there; later steps wait again."""
    run = Ranks()
    rank = run.join(0, 1)
    run.log(rank[0], 1, x=1)
    assert run.after(15.0) == [{"x": 1.0, "ranks": 1, "step": 1}]
    assert run.log(rank[1], 1, x=3) == []
    assert run.after(2.0) == [{"x": 3.0, "ranks": 1, "step": 1}]
    assert run.merge.late == 1
    assert run.log(rank[0], 2, x=1) == []
    assert run.log(rank[1], 2, x=3) == [{"x": 2.0, "ranks": 2, "step": 2}]


def test_ranks_that_went_on_are_not_waited_for_long() -> None:
    """What one rank alone logs comes as soon as the others have later steps, and a moment more."""
    run = Ranks()
    rank = run.join(0, 1)
    run.log(rank[0], 1, x=1)
    run.log(rank[1], 1, x=1)
    run.log(rank[0], 1, accuracy=0.5)
    assert run.after(3.0) == []
    run.log(rank[0], 2, x=1)
    run.log(rank[1], 2, x=1)
    run.log(rank[0], 3, x=1)
    run.log(rank[1], 3, x=1)
    assert run.after(0.1) == [{"accuracy": 0.5, "ranks": 1, "step": 1}]
    assert run.merge.late == 0


def test_a_rank_that_ends_is_not_waited_for() -> None:
    """What waits for it alone is finished with its end."""
    run = Ranks()
    rank = run.join(0, 1)
    run.log(rank[0], 1, x=1)
    run.log(rank[0], 2, x=2)
    assert run.send(rank[1], End(0.0)) == [
        {"x": 1.0, "ranks": 1, "step": 1},
        {"x": 2.0, "ranks": 1, "step": 2},
    ]
    assert run.log(rank[0], 3, x=3) == [{"x": 3.0, "ranks": 1, "step": 3}]


@pytest.mark.parametrize("restart", [False, True], ids=["going on", "restarted"])
def test_ranks_that_attach_for_every_epoch_meet(tmp_path: Path, restart: bool) -> None:
    """Closed and opened again, in whatever order: no step of theirs is split."""
    delivery = Delivery(tmp_path)
    delivery.open_run(1)

    def send(rank: int, *messages: Message) -> None:
        nonlocal delivery
        source_id = f"{rank:032x}"
        data = b"".join(frame(encode(message)) for message in messages)
        delivery.ledger.append(source_id, delivery.ledger.end_of(source_id), data)
        delivery.advance(None)
        if restart:
            delivery.close()
            delivery = Delivery(tmp_path)
            delivery.open_run(1)

    for rank in (0, 1):
        send(rank, Channel(0, "t", rank, 2))
    for epoch in range(3):
        ahead, behind = (0, 1) if epoch % 2 else (1, 0)
        send(ahead, Channel(0, "t", ahead, 2), Row(0, 0.0, epoch, {"x": 1}))
        send(ahead, EndChannel(0, 0), Channel(0, "t", ahead, 2), Row(0, 0.0, epoch + 0.5, {"x": 1}))
        send(behind, Channel(0, "t", behind, 2), Row(0, 0.0, epoch, {"x": 3}))
        send(behind, EndChannel(0, 0))
        send(behind, Channel(0, "t", behind, 2), Row(0, 0.0, epoch + 0.5, {"x": 3}))
        send(ahead, EndChannel(0, 0))
        send(behind, EndChannel(0, 0))
        (attempt,) = [attempts[-1] for _, attempts in delivery.merge.attempts]
        assert attempt.ended == {0, 1}
    assert [row.metrics["t/ranks"] for row in out_rows(delivery)] == [2] * 6
    assert [row.metrics["t/x"] for row in out_rows(delivery)] == [2.0] * 6
    delivery.close()


def test_a_closed_rank_is_not_waited_for() -> None:
    """What waits for it alone is finished with its close, and later steps come at once."""
    run = Ranks()
    rank = run.join(0, 1)
    run.log(rank[0], 1, x=1)
    assert run.send(rank[1], EndChannel(0, 0)) == [{"x": 1.0, "ranks": 1, "step": 1}]
    assert run.log(rank[0], 2, x=3) == [{"x": 3.0, "ranks": 1, "step": 2}]


def test_one_of_two_channels_of_a_rank_ends() -> None:
    """As two clients of a stage's own run have: the rank goes on with the other one."""
    run = Ranks()
    rank = run.join(0, 1)
    run.send(rank[0], Channel(1, "t", 0, 2))
    run.send(rank[0], EndChannel(1, 0))
    assert run.log(rank[1], 1, x=1) == []
    assert run.log(rank[0], 1, x=3) == [{"x": 2.0, "ranks": 2, "step": 1}]
    run.send(rank[0], EndChannel(0, 0))
    assert run.log(rank[1], 2, x=1) == [{"x": 1.0, "ranks": 1, "step": 2}]


def test_a_replayed_step_is_a_new_attempt() -> None:
    """After a restart from a checkpoint the ranks meet again, and nobody is late."""
    run = Ranks()
    rank = run.join(0, 1)
    for step in (1, 2):
        run.log(rank[0], step, x=1)
        run.log(rank[1], step, x=1)
    run.log(rank[0], 3, x=1)
    again = run.join(0, 1, name="-again")
    assert run.log(again[1], 2, x=5) == []
    assert run.log(again[0], 2, x=5) == [{"x": 5.0, "ranks": 2, "step": 2}]
    # What the killed processes still had comes home later, and belongs to their own attempt.
    assert run.log(rank[1], 3, x=3) == [{"x": 2.0, "ranks": 2, "step": 3}]
    assert run.merge.late == 0


def test_another_world_size_is_a_new_attempt() -> None:
    """Fewer ranks after an elastic restart wait for as many as there are now."""
    run = Ranks()
    rank = run.join(0, 1, 2, world_size=3)
    run.log(rank[0], 1, x=1)
    fewer = run.join(0, 1, world_size=2, name="-fewer")
    run.log(fewer[0], 1, x=2)
    assert run.log(fewer[1], 1, x=4) == [{"x": 3.0, "ranks": 2, "step": 1}]
    run.log(rank[1], 1, x=3)
    assert run.log(rank[2], 1, x=5) == [{"x": 3.0, "ranks": 3, "step": 1}]


def test_workers_of_two_jobs_do_not_meet() -> None:
    """In whatever order they come: no row is the mean of what two trainings log."""
    run = Ranks()
    one = run.join(0, name="-one", job="1")
    other = run.join(1, 0, name="-other", job="2")
    one |= run.join(1, name="-one", job="1")
    for step in (1, 2):
        assert run.log(one[0], step, x=1) == []
        assert run.log(other[1], step, x=10) == []
        assert run.log(one[1], step, x=3) == [{"x": 2.0, "ranks": 2, "step": step}]
        assert run.log(other[0], step, x=30) == [{"x": 20.0, "ranks": 2, "step": step}]
    again = run.join(0, 1, name="-again", job="1")
    assert run.log(again[0], 2, x=5) == []
    assert run.log(other[0], 3, x=5) == []
    assert run.log(again[1], 2, x=7) == [{"x": 6.0, "ranks": 2, "step": 2}]
    assert run.log(other[1], 3, x=7) == [{"x": 6.0, "ranks": 2, "step": 3}]
    assert run.merge.late == 0


@pytest.mark.parametrize(
    ("jobs", "workers"),
    [(("1", "2"), (False, False)), (("1", "1"), (False, True)), (("", "2"), (True, True))],
    ids=["each a driver", "a driver and its worker", "one does not say"],
)
def test_who_may_be_of_one_training_meets(
    jobs: tuple[str, str], workers: tuple[bool, bool]
) -> None:
    """A launcher such as torchrun starts drivers, each of which is a job of its own to Ray."""
    run = Ranks()
    rank = {
        number: run.join(number, job=jobs[number], worker=workers[number])[number]
        for number in range(2)
    }
    assert run.log(rank[0], 1, x=1) == []
    assert run.log(rank[1], 1, x=3) == [{"x": 2.0, "ranks": 2, "step": 1}]


def test_jobs_are_kept_apart_over_a_restart(tmp_path: Path) -> None:
    """What the service wrote down says which ranks belong together, also for those to come."""
    jobs = [CLUSTER._replace(session_dir=str(tmp_path), job_id=f"{n:08x}") for n in (1, 2)]
    with local_service(tmp_path) as service:
        service.up()
        service.start()

        def join(job: int, rank: int) -> Client:
            return service.client("train", rank=rank, world_size=2, cluster=jobs[job])

        clients = [join(0, 0), join(1, 0)]
        for job, client in enumerate(clients):
            client.log({"loss": 10.0 * job}, step=job)
            assert client.flush(20.0)
        service.down()
        service.up()
        clients += [join(0, 1), join(1, 1)]
        for job, client in enumerate(clients[2:]):
            client.log({"loss": 10.0 * job + 2}, step=job)
            assert client.flush(20.0)
        for client in clients:
            client.close()
        assert service.service is not None
        report = service.service.finish(60.0, 0)
    assert (report.received_rows, report.complete) == (4, True)
    run = read_runs(service.directory)[report.run.id]
    assert sorted(run.values("train/loss")) == [1.0, 11.0]
    assert run.values("train/ranks") == [2, 2]


def test_a_key_logged_twice_at_a_step_makes_two_rows() -> None:
    """Each round of a step has one value of each rank; different keys of one rank go together."""
    run = Ranks()
    rank = run.join(0, 1)
    run.log(rank[0], 1, x=1)
    run.log(rank[0], 1, y=10)
    run.log(rank[0], 1, x=3)
    assert run.log(rank[1], 1, x=5) == [{"x": 3.0, "y": 10, "ranks": 2, "step": 1}]
    assert run.log(rank[1], 1, x=7) == [{"x": 5.0, "ranks": 2, "step": 1}]
    assert run.merge.waiting_rows == 0


def test_rows_without_a_step_and_single_ranks_do_not_wait() -> None:
    """There is nothing to meet at, or nobody to wait for."""
    run = Ranks()
    pair, alone = run.join(0), run.join(0, world_size=1, name="-alone")
    assert run.send(pair[0], Row(0, 0.0, None, {"x": 1})) == [{"x": 1}]
    assert run.send(pair[0], Row(0, 0.0, math.nan, {"x": 1}))[0]["x"] == 1
    assert run.log(alone[0], 1, x=1) == [{"x": 1.0, "ranks": 1, "step": 1}]


def test_waiting_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too many of them the oldest wait no longer."""
    monkeypatch.setattr(ranks, "MAX_WAITING_ROWS", 10)
    run = Ranks()
    rank = run.join(0)
    for step in range(15):
        run.log(rank[0], step, x=step)
    assert [row["step"] for row in run.after(0.1)] == [0, 1, 2, 3, 4]
    assert run.merge.waiting_rows == 10


def test_the_end_of_a_run_takes_what_waits() -> None:
    """Rows that wait belong to the run that ends; in the next one nobody is late for it."""
    run = Ranks()
    rank = run.join(0, 1)
    run.log(rank[0], 1, x=1)
    assert rows_of(run.merge.flush(0)) == [{"x": 1.0, "ranks": 1, "step": 1}]
    run.merge.open_run(2)
    run.log(rank[1], 1, x=3)
    assert run.log(rank[0], 1, x=5) == [{"x": 4.0, "ranks": 2, "step": 1}]
    assert run.merge.late == 0


@pytest.mark.parametrize("rounds", [15])
def test_interrupted_anywhere_each_row_counts_once(tmp_path: Path, rounds: int) -> None:
    """Restarts at random moments, ranks at random speeds: every row is in exactly one row."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for number in range(rounds):
        world_size, steps = chance.randrange(2, 5), chance.randrange(5, 40)
        queues: dict[str, list[Message]] = {}
        for rank in range(world_size):
            queues[f"{rank:032x}"] = [
                Channel(0, "t", rank, world_size),
                Define(0, "*", None, None, "per_rank"),
                *(Row(0, 1.0, step, {"x": 1000 * rank + step}) for step in range(steps)),
                *([End(2.0)] if chance.random() < 0.5 else []),
            ]
        logged = Counter(
            message.metrics["x"]
            for queue in queues.values()
            for message in queue
            if isinstance(message, Row)
        )
        directory = tmp_path / str(number)
        delivery = Delivery(directory)
        delivery.open_run(1)
        emitted: list[OutRow] = []
        while any(queues.values()):
            source_id = chance.choice([key for key, queue in queues.items() if queue])
            count = chance.randrange(1, 9)
            sent, queues[source_id] = queues[source_id][:count], queues[source_id][count:]
            data = b"".join(frame(encode(message)) for message in sent)
            delivery.ledger.append(source_id, delivery.ledger.end_of(source_id), data)
            if chance.random() < 0.7:
                delivery.advance(None)
            if chance.random() < 0.2:
                delivery.release(Waiting(0.0, chance.choice([0.0, 100.0])))
            if chance.random() < 0.2:
                delivery.close()
                delivery = Delivery(directory)
                delivery.open_run(1)
            # What was finished is never finished again, or otherwise.
            now = out_rows(delivery)
            assert now[: len(emitted)] == emitted
            emitted = now
        delivery.advance(None)
        delivery.release(None)
        emitted = out_rows(delivery)
        values = Counter(
            value for row in emitted for key, value in row.metrics.items() if "/x/rank_" in key
        )
        assert values == logged
        assert delivery.outbox.logged_rows(1) == logged.total() == delivery.merge.rows
        delivery.close()
        again = Delivery(directory)
        assert again.position == again.ledger.end, "everything is consumed"
        assert again.merge.rows == logged.total()
        again.close()


def out_rows(delivery: Delivery) -> list[OutRow]:
    cursor = delivery.outbox.cursor(1, 0)
    found: list[OutRow] = []
    while items := delivery.outbox.read(cursor, 100):
        found += [item for _, item in items if isinstance(item, OutRow)]
    return found


def test_clients_of_a_rank_are_counted(tmp_path: Path) -> None:
    """Its end is said when the last one is closed, and taken back when one is opened again."""
    with local_service(tmp_path) as service:
        service.up()
        service.start()
        one, other = (service.client("train", rank=rank, world_size=2) for rank in range(2))
        connection = one._connection
        again = Client(connection, connection.open_channel("train", 0, 2), "train", one.run)

        def ended() -> set[int]:
            assert service.service is not None
            # Empty until the first row is merged, which is after it was acknowledged.
            found = list(service.service._delivery.merge.attempts)
            return set(found[0][1][-1].ended) if found else set()

        def log(*clients: Client, step: int) -> None:
            for client in clients:
                client.log({"loss": 1.0}, step=step)
                assert client.flush(20.0)

        log(other, again, step=0)
        one.close()
        log(other, again, step=1)
        again.close()
        other.close()
        service.wait_for(lambda _: ended() == {0, 1})
        for step in (2, 3):
            clients = []
            for number, closed in enumerate((one, other)):
                connection = closed._connection
                channel = connection.open_channel("train", number, 2)
                clients.append(Client(connection, channel, "train", one.run))
                log(clients[-1], step=step)
            for client in clients:
                client.close()
        assert service.service is not None
        report = service.service.finish(60.0, 0)
    assert (report.received_rows, report.complete) == (8, True)
    run = read_runs(service.directory)[report.run.id]
    assert run.values("train/ranks") == [2] * 4


def test_in_the_run_one_row_stands_for_all_ranks(tmp_path: Path) -> None:
    """Through the service into W&B's file; the report counts what was logged."""
    with local_service(tmp_path) as service:
        service.up()
        service.start()
        clients = [service.client("train", rank=rank, world_size=3) for rank in range(3)]
        clients[0].define_metric("tokens", across_ranks="sum")
        for step in range(20):
            for rank, client in enumerate(clients):
                client.log({"loss": float(rank), "tokens": 10}, step=step)
        clients[0].log({"accuracy": 1.0}, step=19)
        for client in clients:
            assert client.flush(20.0)
        assert service.service is not None
        report = service.service.finish(60.0, 0)
    assert (report.received_rows, report.delivered_rows, report.complete) == (61, 61, True)
    run = read_runs(service.directory)[report.run.id]
    assert run.values("train/step") == list(range(20))
    assert run.values("train/accuracy") == [1.0]
    assert run.values("train/loss") == [1.0] * 20
    assert run.values("train/tokens") == [30] * 20
    assert run.values("train/ranks") == [3] * 20
    assert run.summary["train/tokens"] == 30
