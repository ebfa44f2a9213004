"""What the newest rows say: folded from the outbox, the same after a restart, bounded."""

from __future__ import annotations

import itertools
import math
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from raywb.live import Live, PipelineProgress, StageProgress
from raywb.nodes.utilization import Reading, metrics_of
from raywb.rows import Channel, Define, Hello, Message, Row, Scalar, encode, frame
from raywb.service import live_nodes, live_rows, live_stage
from raywb.service.delivery import Delivery
from raywb.service.live_rows import LiveRows
from raywb.service.outbox import Cursor, Outbox, OutDefine, OutRow
from raywb.service.stage_runs import FIRST_STAGE_RUN

BEGAN_S = 1_700_000_000.0


class Sources:
    """Processes that log, by what they send to a ledger."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery

    def send(self, source: int, *messages: Message) -> None:
        """Bring messages of one source to the ledger, and make rows of them."""
        source_id = f"{source:032x}"
        offset = self.delivery.ledger.end_of(source_id)
        opening = [Hello(source_id, "c" * 56, "n" * 56, 1, 1, "host", 0.0, "0")]
        sent = [*([] if offset else opening), *messages]
        data = b"".join(frame(encode(one)) for one in sent)
        self.delivery.ledger.append(source_id, offset, data)
        self.delivery.advance(None)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    delivery = Delivery(tmp_path)
    delivery.open_run(1)
    return Sources(delivery)


def row(
    step: int | None, metrics: dict[str, Scalar], *, at_s: float = 0.0, channel: int = 0
) -> Row:
    return Row(channel, BEGAN_S + at_s, step, metrics)


def live_of(sources: Sources, *runs: int) -> Live:
    return sources.delivery.live_rows.live(runs or None)


def stages_of(live: Live) -> dict[str, StageProgress]:
    return {stage.stage: stage for stage in live.stages}


def live_from_rows(rows: list[OutRow]) -> Live:
    folded = LiveRows()
    for one in rows:
        folded.take(one)
    return folded.live()


def test_stages_show_their_newest_values_their_step_and_their_pace(sources: Sources) -> None:
    """Each namespace is a stage, by its axis; values that come rarely stay beside the others."""
    sources.send(
        1,
        Channel(0, "training/pretrain", None, None),
        Channel(1, "validation/pretrain", None, None),
    )
    for step in range(100):
        metrics: dict[str, Scalar] = {"grad_norm": 1.0, "loss": 4.0 - step / 50, "phase": "warm-up"}
        if step % 10 == 0:
            metrics["optimizer/lr"] = step / 1000
        sources.send(1, row(step, metrics, at_s=step * 0.25))
        if step == 50:
            sources.send(1, row(step, {"loss": 3.5, "perplexity": 33.1}, at_s=13, channel=1))
    live = live_of(sources)
    assert [stage.stage for stage in live.stages] == ["training/pretrain", "validation/pretrain"]
    training, validation = live.stages
    assert training.run == 1
    assert training.step == 99
    assert training.steps_per_s == pytest.approx(4.0)
    assert training.metrics == pytest.approx(
        {"grad_norm": 1.0, "loss": 4.0 - 99 / 50, "optimizer/lr": 0.09}
    )
    assert list(training.metrics) == ["grad_norm", "loss", "optimizer/lr"]
    assert training.main == "loss"
    assert training.history == pytest.approx([4.0 - step / 50 for step in range(100)])
    assert training.time_s == BEGAN_S + 99 * 0.25
    assert training.ranks is training.slowest_rank is training.rank_spread_s is None
    assert validation.step == 50
    assert validation.steps_per_s is None
    assert validation.metrics == {"loss": 3.5, "perplexity": 33.1}
    assert live.series == 8
    assert live.untracked_series == live.more_stages == live.more_pipelines == 0


def test_stages_of_ranks_say_who_came_last(sources: Sources) -> None:
    """Rows of ranks become one, and what that one says of the ranks is no metric of the stage."""
    for rank in range(4):
        sources.send(rank, Channel(0, "train", rank, 4))
    for step in range(3):
        for rank in range(4):
            at_s = step + (0.5 if rank == 2 else 0.1)
            sources.send(rank, row(step, {"train_loss": float(rank)}, at_s=at_s))
    (stage,) = live_of(sources).stages
    assert (stage.ranks, stage.slowest_rank) == (4, 2)
    assert stage.rank_spread_s == pytest.approx(0.4)
    assert stage.metrics == {"train_loss": 1.5}
    assert stage.main == "train_loss"
    assert stage.steps_per_s == pytest.approx(1.0)


def test_namespaces_are_found_without_an_axis(sources: Sources) -> None:
    """A row without a step belongs to what its keys have in common, or each key to its own."""
    sources.send(1, Channel(0, "prepare", None, None), Channel(1, None, None, None))
    sources.send(1, row(None, {"rows_filtered/short": 1}))
    assert list(stages_of(live_of(sources))) == ["prepare/rows_filtered"]
    sources.send(1, row(None, {"rows_in": 9, "rows_filtered/short": 2}, at_s=1))
    sources.send(1, row(None, {"rows_filtered/short": 3}, at_s=2))
    sources.send(1, row(None, {"accuracy": 0.5, "eval/loss": 1.0}, at_s=3, channel=1))
    sources.send(1, row(None, {"raywb/backlog_rows": 5}, at_s=4, channel=1))
    stages = stages_of(live_of(sources))
    assert stages.keys() == {"prepare", "", "eval"}
    assert stages["prepare"].metrics == {"rows_in": 9, "rows_filtered/short": 3}
    assert stages["prepare"].step is None
    assert stages["prepare"].history == [1, 2, 3] or stages["prepare"].main == "rows_in"
    assert stages[""].metrics == {"accuracy": 0.5}
    assert stages["eval"].main == "loss"


def test_a_stage_is_drawn_on_the_axis_that_its_user_defined(sources: Sources) -> None:
    """A glob with a step metric makes a stage of what it covers, also after its first rows."""
    sources.send(1, Channel(0, "sft", None, None))
    sources.send(1, row(None, {"a/x": 1.0, "epoch": 3}))
    sources.send(1, Define(0, "*", "epoch", None), row(None, {"a/x": 2.0, "epoch": 4}, at_s=1))
    (stage,) = live_of(sources).stages
    assert (stage.stage, stage.step, stage.metrics) == ("sft", 4, {"a/x": 2.0})


def test_a_training_that_goes_back_has_a_pace_again(sources: Sources) -> None:
    """Steps that are replayed after a checkpoint, and late rows, make no nonsense of the pace."""
    sources.send(1, Channel(0, "train", None, None))
    for n in range(60):
        sources.send(1, row(1000 + 10 * n, {"loss": 1.0}, at_s=n * 2))
        sources.send(1, row(5, {"loss": 9.0}, at_s=n * 2))  # late, of long ago
    (stage,) = live_of(sources).stages
    assert stage.steps_per_s == pytest.approx(5.0)
    for n in range(20):
        sources.send(1, row(300 + 10 * n, {"loss": 1.0}, at_s=200 + n * 5))
    (stage,) = live_of(sources).stages
    assert stage.step == 490
    assert stage.steps_per_s == pytest.approx(2.0)


def test_values_that_are_no_numbers_do_no_harm(sources: Sources) -> None:
    """Texts and truth values are no metrics; NaN and infinity are."""
    sources.send(1, Channel(0, "train", None, None))
    odd: list[Scalar] = ["text", True, math.nan, math.inf, 1.0, "text"]
    for step, value in enumerate(odd):
        sources.send(1, row(step, {"loss": value, "b": 2}, at_s=step))
    (stage,) = live_of(sources).stages
    assert stage.metrics == {"b": 2}
    sources.send(1, row(9, {"loss": math.nan, "b": 2}, at_s=9))
    (stage,) = live_of(sources).stages
    assert math.isnan(stage.metrics["loss"])
    msgspec.json.encode(live_of(sources))


@pytest.mark.xenna
def test_a_pipeline_is_what_its_newest_row_says(sources: Sources, tmp_path: Path) -> None:
    """Stages in their order, work that is known to come, the bottleneck, and how it ended."""
    import xenna_cases

    path = tmp_path / "stats.jsonl"
    with xenna_cases.no_cluster(), xenna_cases.make_hook(path):
        pipeline = xenna_cases.Monitored(
            "PlanStage", "DownloadStage", "DownloadStage", num_inputs=20, batch_sizes=[2, 1, 1]
        )
        pipeline.snapshot(20)
        pipeline.finish_tasks(0, 4, returns=2)
        pipeline.queue_tasks(0, 2)
        pipeline.queues[0] = 5
        pipeline.finish_tasks(1, 3)
        pipeline.snapshot(10)
        pipeline.finish_tasks(0, 6, returns=2)
        pipeline.finish_tasks(1, 17)
        pipeline.finish_tasks(2, 20)
        pipeline.stop()
    records = [record["metrics"] for record in xenna_cases.read_records(path)]
    series = Channel(0, "xenna", None, None, label="pretrain", axis="pipeline_duration_s")
    seen: list[PipelineProgress] = []
    for source, records_of in ((1, records), (2, records[:2])):
        sources.send(source, series)
        for n, record in enumerate(records_of):
            metrics = {k: v for k, v in record.items() if k != "bottleneck_stage"}
            if source == 2 and n == 1:
                metrics |= {"error_type": "ValueError", "error_message": "three\n is [bad]"}
                metrics |= {"error_stage": "plan_stage"}
            sources.send(source, row(None, metrics, at_s=n))
            seen.append(live_of(sources).pipelines[-1 if source == 1 else 0])
    first, middle, last = seen[:3]
    assert (first.name, first.run, first.state, first.percent) == ("xenna", 1, "running", 0)
    assert first.inputs_left == 20
    plan, one, two = middle.stages
    assert [plan.name, one.name, two.name] == ["plan_stage", "download_stage", "download_stage_2"]
    assert (plan.tasks_completed, plan.tasks_known, plan.queue_in) == (4, 10, 1)
    assert (one.tasks_completed, one.tasks_known) == (3, 3 + plan.queue_out)
    assert plan.queue_out == 5
    index = records[1].get("bottleneck_stage_index")
    assert [n for n, stage in enumerate(middle.stages) if stage.is_bottleneck] == (
        [] if index is None else [index]
    )
    assert (last.state, last.percent, last.outputs, last.inputs_left) == ("done", 100, 20, 0)
    assert [(one.tasks_completed, one.tasks_known) for one in last.stages] == [
        (10, 10),
        (20, 20),
        (20, 20),
    ]
    assert last.stages[2].is_bottleneck == (records[-1]["bottleneck_stage_index"] == 2)
    assert last.inputs_per_s == pytest.approx(20 / last.duration_s)
    live = live_of(sources)
    assert live.stages == []
    assert {one.name: one.state for one in live.pipelines} == {
        "xenna": "done",
        "xenna/pretrain_2": "failed",
    }
    failed = next(one for one in live.pipelines if one.state == "failed")
    assert failed.error == "plan_stage: ValueError: three is [bad]"


def nodes_row(at_s: float, cpus: dict[str, float], alive: int) -> OutRow:
    readings = {name: Reading({"cpu_percent": cpu}, [cpu]) for name, cpu in cpus.items()}
    metrics: dict[str, Scalar] = {**metrics_of(readings, alive), "nodes/time_s": at_s}
    return OutRow(1, BEGAN_S + at_s, metrics, logged=0)


def test_nodes_keep_their_last_reading_and_say_when_it_is_stale() -> None:
    """A node that did not answer is shown with what it said last; means are of all."""
    live = live_from_rows(
        [
            nodes_row(0, {"b": 10.0, "a": 20.0}, 2),
            nodes_row(10, {"b": 50.0}, 2),
        ]
    )
    a, b = live.nodes
    assert (a.name, a.values, a.stale, a.time_s) == ("a", {"cpu_percent": 20.0}, True, BEGAN_S)
    assert (b.name, b.values, b.stale) == ("b", {"cpu_percent": 50.0}, False)
    assert live.all_nodes["mean/cpu_percent"] == 50.0
    assert (live.all_nodes["alive"], live.all_nodes["answered"]) == (2, 1)
    assert live.stages == []
    many = {f"node-{n}": float(n) for n in range(100)}
    live = live_from_rows([nodes_row(0, {"a": 20.0}, 1), nodes_row(10, many, 100)])
    assert live.nodes == []
    assert live.all_nodes["max/cpu_percent"] == 99.0


def test_a_restart_and_a_reader_of_the_files_see_the_same(tmp_path: Path) -> None:
    """The fold follows from the outbox alone: replayed, or read row by row, it is equal."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    delivery = Delivery(tmp_path, [FIRST_STAGE_RUN])
    delivery.open_run(1)
    sources = Sources(delivery)
    steps = [0] * 5
    for n in range(5):
        run = FIRST_STAGE_RUN if n == 4 else 0
        rank = n if n < 2 else None
        stage = "train" if n < 2 else f"stage_{n}"
        sources.send(n, Channel(0, stage, rank, 2 if n < 2 else None, run=run, session=int(n == 4)))
    for at in range(400):
        n = rng.randrange(5)
        steps[n] += rng.choice([1, 1, 1, -1])
        keys = rng.sample(["loss", "lr", "acc", "deep/er", "text"], rng.randint(1, 4))
        metrics: dict[str, Scalar] = {k: "x" if k == "text" else rng.random() for k in keys}
        step = None if rng.random() < 0.1 else steps[n]
        sources.send(n, row(step, metrics, at_s=at * 0.3))
        if at % 25 == 0:
            delivery.add([nodes_row(at * 0.3, {"a": rng.random()}, 1)])
    while delivery.release(None):
        pass
    before = live_of(sources)
    assert {stage.run for stage in before.stages} == {1, FIRST_STAGE_RUN}
    assert sum(len(stage.history) for stage in before.stages) > 100
    delivery.close()
    again = Delivery(tmp_path, [FIRST_STAGE_RUN])
    assert again.live_rows.live() == before
    for run in (1, FIRST_STAGE_RUN):
        outbox = Outbox(tmp_path / "outbox", read_only=True)
        read = LiveRows()
        cursor: Cursor = outbox.cursor(run, 0)
        cursor.position = 0
        while items := outbox.read(cursor, 50):
            for _, item in items:
                read.take(item)
        assert read.live() == again.live_rows.live([run])
    again.close()


def test_a_history_is_of_the_whole_run_and_of_fixed_size() -> None:
    """However long a run is, its history has values from its beginning to its end, evenly."""
    rows = [
        OutRow(1, BEGAN_S + n, {"train/loss": float(n), "train/step": n}) for n in range(100_000)
    ]
    (stage,) = live_from_rows(rows).stages
    kept = stage.history
    assert live_stage.HISTORY_VALUES <= len(kept) <= live_stage.MOST_HISTORY_VALUES + 1
    assert (kept[0], kept[-1]) == (0.0, 99_999.0)
    gaps = {later - earlier for earlier, later in itertools.pairwise(kept[:-1])}
    assert len(gaps) == 1, gaps
    for count in range(1, 600):
        (stage,) = live_from_rows(rows[:count]).stages
        assert stage.history[-1] == count - 1
        assert len(set(stage.history)) == len(stage.history)


def test_memory_is_bounded_and_what_is_left_out_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ever new keys, combinations and namespaces: the first ones are shown, the others counted."""
    monkeypatch.setattr(live_rows, "MAX_SERIES", 500)
    monkeypatch.setattr(live_rows, "MAX_UNTRACKED_SERIES", 400)
    monkeypatch.setattr(live_rows, "MAX_REMEMBERED_KEYS", 2_000)
    folded = LiveRows()

    def take(begin: int, end: int) -> int:
        for n in range(begin, end):
            metrics: dict[str, Scalar] = {"train/loss": float(n), f"train/x_{n}": 1.0, f"s{n}/y": 2}
            folded.take(OutRow(1, BEGAN_S + n * 0.001, metrics))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        early, late = take(0, 1_000), take(1_000, 4_000)
    finally:
        tracemalloc.stop()
    assert late - early < 500_000
    live = folded.live()
    assert live.untracked_series == 400
    assert 800 < live.series <= 900
    assert live.dropped_stages == 400
    assert len(live.stages) == live_rows.LISTED_STAGES
    assert live.more_stages < 400 + 500
    train = stages_of(live)["train"]
    assert train.metrics["loss"] == 3_999
    assert len(train.metrics) == live_stage.LISTED_METRICS


def test_runs_that_rest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full fold gives up the stage that has had no row for longest, not one that goes on."""
    monkeypatch.setattr(live_rows, "MAX_SERIES", 10)
    folded = LiveRows()
    first, second, third = (FIRST_STAGE_RUN + n for n in range(3))
    for number, at_s in ((first, 0.0), (second, 20.0)):
        metrics: dict[str, Scalar] = {f"a/{n}": n for n in range(5)}
        folded.take(OutRow(number, BEGAN_S + at_s, metrics))
    late = OutRow(third, BEGAN_S + 50, {"b/x": 1})
    folded.take(late)
    assert [stage.run for stage in folded.live().stages] == [second, first]
    assert folded.live([third]).untracked_series == 1
    assert folded.live([third]).dropped_stages == 1
    monkeypatch.setattr(folded, "_look_again", 0)
    folded.take(OutRow(third, BEGAN_S + 65, {"b/y": 1}))
    assert [stage.run for stage in folded.live().stages] == [third, second]
    assert folded.live([third]).stages[0].metrics == {"y": 1}
    for number in (1, 2):  # the cluster's own runs follow one another
        folded.take(OutRow(number, BEGAN_S + 200, {f"c/{n}": n for n in range(5)}))
    assert {stage.run for stage in folded.live().stages} >= {2}
    assert folded.live([2]).untracked_series == 0


def test_as_many_pipelines_as_come_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many pipelines the ones that have ended are forgotten first."""
    monkeypatch.setattr(live_rows, "MAX_PIPELINES", 10)
    folded = LiveRows()
    for n in range(50):
        name = "xenna" if n == 0 else f"xenna/sft_{n + 1}"
        values: dict[str, Any] = {"pipeline_duration_s": 1.0, "main_loop_rate_hz": 1.0}
        values |= {"num_input_remaining": 0, "progress": 50 if n == 0 else 100}
        folded.take(OutRow(1, BEGAN_S + n, {f"{name}/{k}": v for k, v in values.items()}))
    names = [one.name for one in folded.live().pipelines]
    assert len(names) == 10
    assert names[:2] == ["xenna", "xenna/sft_50"]


#: Rows of one client after which a stage turns out to lie within another one.
NARROW_THEN_WIDE: list[dict[str, Scalar]] = [
    {"a/x": 1},
    {"b/c/y": 1},
    {"a/x": 2, "b/z": 3},
    {"a/loss": 1.0},
    {"a/x": 7, "b/z": 3},
]


def newest_of(live: Live) -> list[tuple[str, float]]:
    """Every number that stages show, under its full name."""
    return sorted(
        (f"{stage.stage}/{key}" if stage.stage else key, value)
        for stage in live.stages
        for key, value in stage.metrics.items()
    )


def test_a_stage_that_lies_within_another_becomes_a_part_of_it(sources: Sources) -> None:
    """Keys in ever other combinations are learnt anew, and none of their values is lost."""
    sources.send(1, Channel(0, None, None, None))
    truth: dict[str, Scalar] = {}
    for at, metrics in enumerate(NARROW_THEN_WIDE):
        sources.send(1, row(None, metrics, at_s=at))
        truth |= metrics
        assert newest_of(live_of(sources)) == sorted(truth.items())
    stages = stages_of(live_of(sources))
    assert stages["b"].metrics == {"c/y": 1, "z": 3}
    assert stages["a"].main == "loss"
    assert sources.delivery.outbox.rows_of(1) == len(NARROW_THEN_WIDE)
    assert sources.delivery.live_rows.failures == 0


def test_newest_values_are_the_truth_whatever_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested keys in any combination, axes in between: each key once, with its newest value."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(60):
        monkeypatch.setattr(live_rows, "MAX_REMEMBERED_KEYS", rng.choice([5, 40, 100_000]))
        folded, truth = LiveRows(), dict[str, Scalar]()
        for at in range(80):
            if rng.random() < 0.03:
                namespace = "/".join(rng.choices("abc", k=rng.randint(1, 3)))
                folded.take(OutDefine(1, f"{namespace}/*", f"{namespace}/step", None))
            metrics: dict[str, Scalar] = {}
            for _ in range(rng.randint(1, 5)):
                depth = rng.randint(0, 3)
                name = rng.choice(["loss", "x", "y"])
                key = "/".join([*rng.choices("abc", k=depth), name])
                metrics[key] = rng.random() if rng.random() < 0.95 else math.inf
            folded.take(OutRow(1, BEGAN_S + at, metrics))
            truth |= metrics
            assert newest_of(folded.live()) == sorted(truth.items()), (seed, at)
        assert folded.failures == 0, folded.problem


def test_a_view_that_fails_stops_neither_delivery_nor_recovery_nor_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are in the outbox once, the service begins again, and the failures are counted."""

    def fail(*_: object) -> None:
        raise KeyError("odd")

    delivery = Delivery(tmp_path)
    delivery.open_run(1)
    sources = Sources(delivery)
    sources.send(1, Channel(0, "train", None, None), row(0, {"loss": 1.0}))
    monkeypatch.setattr(live_stage.RowsAlike, "take", fail)
    for step in range(1, 6):
        sources.send(1, row(step, {"loss": 1.0}, at_s=step))
    assert delivery.outbox.rows_of(1) == 6
    assert delivery.live_rows.failures == 5
    assert "odd" in str(delivery.live_rows.problem)
    delivery.close()
    again = Delivery(tmp_path)
    assert again.outbox.rows_of(1) == 6
    assert again.live_rows.failures == 6
    monkeypatch.undo()
    monkeypatch.setattr(live_stage.LiveStage, "describe", fail)
    Sources(again).send(1, row(7, {"loss": 1.0}, at_s=9))
    again.add([nodes_row(0, {"a": 1.0}, 1)])
    live = live_of(Sources(again))
    assert live.stages == []
    assert [node.name for node in live.nodes] == ["a"]
    assert again.live_rows.failures == 7
    again.close()


def test_a_batch_is_written_once_whatever_happens_to_it_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the outbox is not put there again at the next call."""
    delivery = Delivery(tmp_path)
    delivery.open_run(1)
    sources = Sources(delivery)

    def fail(*_: object) -> None:
        raise KeyError("odd")

    with monkeypatch.context() as patch:
        patch.setattr(delivery.folds[1], "apply", fail)
        with pytest.raises(KeyError):
            sources.send(1, Channel(0, "train", None, None), row(0, {"loss": 1.0}))
    for _ in range(3):
        delivery.advance(None)
    assert delivery.outbox.rows_of(1) == 1
    delivery.close()


PIPELINE: dict[str, Scalar] = {
    "pipeline_duration_s": 1.0,
    "main_loop_rate_hz": 1.0,
    "num_input_remaining": 5,
    "progress": 50.0,
}


def pipeline_row(name: str, at_s: float, **values: Scalar) -> OutRow:
    metrics = {f"{name}/{key}": value for key, value in (PIPELINE | values).items()}
    return OutRow(1, BEGAN_S + at_s, metrics)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e308, "text", True])
@pytest.mark.parametrize("key", ["ranks", "slowest_rank", "rank_spread_s", "step", "loss"])
def test_odd_numbers_of_a_stage_do_no_harm(key: str, odd: Scalar) -> None:
    """Whatever a user logs under a name that says something: the stage is shown."""
    rows = [OutRow(1, BEGAN_S + n, {"train/loss": 1.0, f"train/{key}": odd}) for n in range(3)]
    live = live_from_rows(rows)
    assert [stage.stage for stage in live.stages] == ["train"]
    msgspec.msgpack.decode(msgspec.msgpack.encode(live), type=Live)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e308, "text", True])
def test_odd_numbers_of_a_pipeline_do_no_harm(odd: Scalar) -> None:
    """No value of a snapshot keeps the pipeline from being shown."""
    keys = [*PIPELINE, "inputs_processed_per_s", "outputs_per_s", "num_outputs"]
    keys += ["bottleneck_stage_index", "stage/a/queue_in", "stage/a/resource/mem_gb"]
    for key in keys:
        values: dict[str, Any] = {"inputs_processed_per_s": 1e300, "stage/a/tasks_completed": 3}
        folded = LiveRows()
        folded.take(pipeline_row("xenna", 0.0, **(values | {key: odd})))
        (one,) = folded.live().pipelines
        assert one.name == "xenna"
        assert folded.failures == 0


def test_when_nobody_answers_any_more_all_nodes_are_stale() -> None:
    """Without a further row their age tells; what was said of all of them is not the present."""
    folded = LiveRows()
    folded.take(nodes_row(0, {"a": 1.0, "b": 2.0}, 2))
    fresh = folded.live(now_s=BEGAN_S + 59, nodes_stale_s=60)
    assert [node.stale for node in fresh.nodes] == [False, False]
    assert fresh.all_nodes["mean/cpu_percent"] == 1.5
    old = folded.live(now_s=BEGAN_S + 61, nodes_stale_s=60)
    assert [node.stale for node in old.nodes] == [True, True]
    assert old.all_nodes == {"alive": 2, "answered": 0}
    assert [node.stale for node in folded.live().nodes] == [False, False]


def test_nodes_that_left_long_ago_are_forgotten() -> None:
    """With spot nodes that come and go, only those of late are kept, and only their values."""
    folded = LiveRows()
    names = [f"ip-10-0-0-{n}" for n in range(64)]
    tracemalloc.start()
    try:
        for at in range(600):
            names[at % 64] = f"ip-10-0-0-{64 + at}"
            folded.take(nodes_row(at * 15.0, dict.fromkeys(names, 1.0), 64))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    live = folded.live()
    gone = [node for node in live.nodes if node.stale]
    assert len(live.nodes) - len(gone) == 64
    assert len(gone) == live_nodes.GONE_ROWS
    assert all(node.values == {"cpu_percent": 1.0} for node in live.nodes)
    assert held < 3_000_000


def test_a_stage_that_comes_late_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many, the one that is silent longest is given up, and counted."""
    monkeypatch.setattr(live_rows, "MAX_STAGES", 200)
    folded = LiveRows()
    for n in range(500):
        folded.take(OutRow(1, BEGAN_S + n, {f"w{n}/loss": 1.0}))
        live = folded.live()
        assert live.stages[0].stage == f"w{n}"
        assert len(live.stages) + live.more_stages == n + 1
    assert live.dropped_stages >= 300
    # One that comes again is no dropped one any more.
    folded.take(OutRow(1, BEGAN_S + 500, {"w0/loss": 2.0}))
    live = folded.live()
    assert live.stages[0].metrics == {"loss": 2.0}
    assert len(live.stages) + live.more_stages == 500


@pytest.mark.parametrize("of_one", [True, False])
def test_a_training_after_very_many_keys_is_shown(
    monkeypatch: pytest.MonkeyPatch, *, of_one: bool
) -> None:
    """Junk keys of one stage that goes on, or of many that are over, leave room for it."""
    monkeypatch.setattr(live_rows, "MAX_SERIES", 1_000)
    folded = LiveRows()
    for n in range(3_000):
        name = "junk" if of_one else f"junk{n // 10}"
        folded.take(OutRow(1, BEGAN_S + n * 0.1, {f"{name}/k{n}": 1.0}))
    for n in range(300):
        if of_one:
            folded.take(OutRow(1, BEGAN_S + 300 + n, {f"junk/more{n}": 1.0}))
        folded.take(OutRow(1, BEGAN_S + 300 + n, {"train/loss": float(n), "train/step": n}))
    train = stages_of(folded.live())["train"]
    assert train.metrics == {"loss": 299.0}
    assert train.history[0] == 0.0
    assert train.steps_per_s == pytest.approx(1.0)
    assert folded.live().untracked_series > 1_000
    assert folded.live().series == 3_002 + (300 if of_one else 0)


def test_stages_that_all_go_on_do_not_push_one_another_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full fold gives up only what is silent: live stages keep their histories."""
    monkeypatch.setattr(live_rows, "MAX_SERIES", 40)
    folded = LiveRows()
    for at in range(200):
        for stage in range(8):
            metrics: dict[str, Scalar] = {f"s{stage}/k{n}": float(at) for n in range(10)}
            folded.take(OutRow(1, BEGAN_S + at, metrics))
    live = folded.live()
    assert {stage.stage for stage in live.stages} == {"s0", "s1", "s2", "s3"}
    assert all(stage.history[0] == 0.0 for stage in live.stages)
    assert live.dropped_stages == 4
    for at in range(200, 300):
        folded.take(OutRow(1, BEGAN_S + at, {"s7/k0": float(at)}))
    assert folded.live().stages[0].stage == "s7"


def test_pipelines_that_say_something_come_before_those_that_died() -> None:
    """A killed driver leaves its pipeline running for ever; the ones at work are listed first."""
    folded = LiveRows()
    for n in range(60):
        folded.take(pipeline_row(f"xenna/s_{n}", n * 1000.0))
    folded.take(pipeline_row("xenna/done", 60_001.0, progress=100.0))
    folded.take(pipeline_row("xenna/s_0", 60_002.0))
    live = folded.live()
    assert [one.name for one in live.pipelines[:2]] == ["xenna/s_0", "xenna/s_59"]
    assert live.more_pipelines == 61 - live_rows.LISTED_PIPELINES
    for n in range(60, 60 + live_rows.MAX_PIPELINES):
        folded.take(pipeline_row(f"xenna/s_{n}", 70_000.0 + n))
        if n % 20 == 0:
            folded.take(pipeline_row("xenna/s_0", 70_000.5 + n))
    live = folded.live()
    assert len(live.pipelines) + live.more_pipelines == live_rows.MAX_PIPELINES
    assert "xenna/s_0" in {one.name for one in live.pipelines}


@pytest.mark.parametrize("odd_s", [1.7e12, 4.0e9, 0.0])
def test_one_wrong_time_does_not_spoil_the_pace(odd_s: float) -> None:
    """Milliseconds, a far future, 1970: a few rows later the pace is that of the rows again."""
    folded = LiveRows()
    for n in range(200):
        time_s = odd_s if n == 5 else BEGAN_S + n * 0.5
        folded.take(OutRow(1, time_s, {"train/loss": 1.0, "train/step": n}))
    (stage,) = folded.live().stages
    assert stage.steps_per_s == pytest.approx(2.0)


def test_an_axis_for_everything_or_for_one_key_is_the_stages() -> None:
    """In a run of the user's own, ``*`` covers all; a key's own definition goes before it."""
    folded = LiveRows()
    number = FIRST_STAGE_RUN
    folded.take(OutRow(number, BEGAN_S, {"val/x": 1.0}))
    folded.take(OutDefine(number, "*", "epoch", None))
    for n in range(5):
        folded.take(
            OutRow(number, BEGAN_S + n, {"epoch": n, "loss": 1.0, "val/loss": 2.0, "it": 7 * n})
        )
    (stage,) = folded.live().stages
    assert (stage.stage, stage.step, stage.steps_per_s) == ("", 4, pytest.approx(1.0))
    assert stage.metrics == {"loss": 1.0, "val/loss": 2.0, "it": 28, "val/x": 1.0}
    folded.take(OutDefine(number, "loss", "it", None))
    for n in range(5, 10):
        folded.take(OutRow(number, BEGAN_S + n, {"epoch": n, "loss": 1.0, "it": 7 * n}))
    (stage,) = folded.live().stages
    assert (stage.step, stage.steps_per_s) == (63, pytest.approx(7.0))


def test_axes_stay_with_a_run_that_made_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A definition comes once: a run that goes on after a pause has its axis still."""
    monkeypatch.setattr(live_rows, "MAX_SERIES", 6)
    folded = LiveRows()
    first, second = FIRST_STAGE_RUN, FIRST_STAGE_RUN + 1
    folded.take(OutDefine(first, "a/*", "a/epoch", None))
    folded.take(OutRow(first, BEGAN_S, {"a/epoch": 1, "a/loss": 1.0}))
    folded.take(OutRow(second, BEGAN_S + 5_000, {f"b/{n}": 1.0 for n in range(6)}))
    assert [stage.stage for stage in folded.live().stages] == ["b"]
    folded.take(OutRow(first, BEGAN_S + 10_000, {"a/epoch": 2, "a/loss": 1.0}))
    stage = folded.live().stages[0]
    assert (stage.stage, stage.step, stage.metrics) == ("a", 2, {"loss": 1.0})


def test_rows_of_very_many_keys_are_learnt_in_time() -> None:
    """What a row with new keys costs grows with their number, not with its square."""
    keys = [f"nodes/n{n}/cpu_percent" for n in range(20_000)]
    began_s = time.perf_counter()
    live_from_rows([OutRow(1, BEGAN_S, {"nodes/answered": 1, **dict.fromkeys(keys, 1.0)})])
    assert time.perf_counter() - began_s < 2
