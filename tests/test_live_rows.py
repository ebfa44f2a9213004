"""What the newest rows say: folded from the outbox, the same after a restart, bounded."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest

from raywb.live import Live, PipelineProgress, StageProgress
from raywb.nodes.utilization import Reading, metrics_of
from raywb.rows import Channel, Define, Hello, Message, Row, Scalar, encode, frame
from raywb.service import live_rows, live_stage
from raywb.service.delivery import Delivery
from raywb.service.live_rows import LiveRows
from raywb.service.outbox import Cursor, Outbox, OutRow
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
    assert live.series == 900
    assert live.more_stages == 250 - live_rows.LISTED_STAGES
    train = stages_of(live)["train"]
    assert train.metrics["loss"] == 3_999
    assert len(train.metrics) == live_stage.LISTED_METRICS


def test_runs_that_rest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full fold forgets the run that has had no row for longest, not one that goes on."""
    monkeypatch.setattr(live_rows, "MAX_SERIES", 10)
    folded = LiveRows()
    first, second, third = (FIRST_STAGE_RUN + n for n in range(3))
    for number, at_s in ((first, 0.0), (second, 500.0)):
        metrics: dict[str, Scalar] = {f"a/{n}": n for n in range(5)}
        folded.take(OutRow(number, BEGAN_S + at_s, metrics))
    late = OutRow(third, BEGAN_S + 550, {"b/x": 1})
    folded.take(late)
    assert [stage.run for stage in folded.live().stages] == [second, first]
    assert folded.live([third]).untracked_series == 1
    folded.take(OutRow(third, BEGAN_S + 650, {"b/y": 1}))
    assert [stage.run for stage in folded.live().stages] == [third, second]
    assert folded.live([third]).stages[0].metrics == {"y": 1}
    for number in (1, 2):  # the cluster's own runs follow one another
        folded.take(OutRow(number, BEGAN_S + 650, {f"c/{n}": n for n in range(5)}))
    assert {stage.run for stage in folded.live().stages} == {second, third, 2}


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
