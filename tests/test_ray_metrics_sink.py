"""The sink for Ray's metrics without Ray: which series there are, what ends, what is too much."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from typing import Any

import msgspec
import pytest

from raywb.live import (
    Live,
    NodeUsage,
    PipelineProgress,
    PipelineStageProgress,
    StageProgress,
)
from raywb.reports import (
    NodeStatus,
    RunInfo,
    SinkStatus,
    SourceStatus,
    StageRunStatus,
    StageStatus,
    Status,
)
from raywb.service import ray_metrics_sink
from raywb.service.ray_metrics_sink import (
    LAST_EXPORTS,
    MAX_LABEL_CHARS,
    MAX_SERIES,
    RayMetricsSink,
    clean_label,
)
from raywb.service.series_names import METRICS
from raywb.service.status_samples import (
    PIPELINE_SILENT_S,
    READING_INTERVALS,
    SHORTEST_READING_S,
)

NOW_S = 1_800_000_000.0


class Recorder:
    """Gauges as Ray's workers have them: what is set is there until it is NaN."""

    def __init__(self) -> None:
        self.export_interval_s = 10.0
        self.series: dict[tuple[str, tuple[str, ...]], float] = {}
        self.error: Exception | None = None
        #: Names and labels of what is refused; empty: ``error`` is raised for all.
        self.refused: set[tuple[str, tuple[str, ...]]] = set()
        self.rounds = threading.Semaphore(0)
        self.empty = threading.Event()

    def gauge(self, name: str, description: str, labels: tuple[str, ...]) -> Any:
        assert description
        return _Gauge(self, name, labels)

    def names(self) -> set[str]:
        return {name for name, _ in self.series}

    def of(self, name: str) -> dict[tuple[str, ...], float]:
        return {labels: value for (one, labels), value in self.series.items() if one == name}


class _Gauge:
    def __init__(self, recorder: Recorder, name: str, labels: tuple[str, ...]) -> None:
        self._recorder, self._name, self._labels = recorder, name, labels

    def set(self, value: float, tags: dict[str, str]) -> None:
        recorder = self._recorder
        assert tuple(tags) == self._labels, "Ray wants all labels, and no others"
        key = self._name, tuple(tags.values())
        if recorder.error is not None and key in (recorder.refused or {key}):
            raise recorder.error
        if math.isnan(value):
            del recorder.series[key]
            if not recorder.series:
                recorder.empty.set()
        else:
            recorder.series[key] = value
            recorder.empty.clear()
            if self._name == "raywb_series_dropped":  # the last one of a round
                recorder.rounds.release()


class Watch:
    """A sink, its time, and the status that it shows."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recorder = Recorder()
        self.sink = RayMetricsSink(
            self.recorder, clock=lambda: self.now, wall_clock=lambda: NOW_S + self.now
        )
        self.status = status()

    def show(self, after_s: float = 0.0, **changes: Any) -> Recorder:
        self.now += after_s
        self.status = msgspec.structs.replace(self.status, **changes)
        self.sink.publish(self.status)
        return self.recorder


@pytest.fixture
def watch() -> Watch:
    return Watch()


LAST_S = LAST_EXPORTS * 10.0


def status(**fields: Any) -> Status:
    return Status(
        **{
            "version": "1",
            "run": run_info(1, "run00001"),
            "finished": False,
            "address": "127.0.0.1:1",
            "incarnation": 1,
            "received_rows": 10,
            "outbox_rows": 8,
            "backlog_rows": 3,
            "lost": {"after_close": 2},
            "rejected": 1,
            "after_finish_rows": 0,
            "sink": SinkStatus(state="running", applied_rows=5, restarts=0),
            "sources": [source("training/a"), source("hook")],
            "problems": [],
            "nodes": [node_status(name) for name in ("host", "one", "two", "three")],
            **fields,
        }
    )


def run_info(number: int, run_id: str, job_type: str = "raywb") -> RunInfo:
    return RunInfo(
        project="demo",
        id=run_id,
        name=f"name of {run_id}",
        mode="online",
        dir="/nowhere",
        url=f"https://wandb.ai/team/demo/runs/{run_id}",
        job_type=job_type,
        epoch=number,
    )


def source(stage: str, *, ended: bool = False, heard_ago_s: float | None = 1.0) -> SourceStatus:
    return SourceStatus(
        source_id=stage,
        hostname="host",
        node_id="node",
        pid=1,
        stages=[stage],
        received_bytes=1,
        received_rows=1,
        heard_ago_s=None if ended else heard_ago_s,
        ended=ended,
    )


def killed(stage: str) -> SourceStatus:
    return msgspec.structs.replace(source(stage, ended=True), killed=True)


def pipeline(name: str, state: str = "running", percent: float = 40.0) -> PipelineProgress:
    part = PipelineStageProgress(
        name="plan_stage",
        tasks_completed=4,
        tasks_known=9,
        queue_in=3,
        queue_out=1,
        slots_used=2,
        slots_empty=0,
        actors_ready=2,
        actors_pending=1,
        memory_gb=2.0,
        is_bottleneck=True,
    )
    return PipelineProgress(
        name=name,
        run=1,
        state=state,
        percent=percent,
        duration_s=12.0,
        inputs_left=5,
        outputs=4,
        stages=[part],
        time_s=NOW_S,
    )


def stage(name: str, run: int = 1, **metrics: float) -> StageProgress:
    return StageProgress(
        stage=name,
        run=run,
        step=7.0,
        steps_per_s=None,
        metrics=metrics or {"loss": 0.5},
        main="loss",
        history=[],
        time_s=NOW_S,
    )


def node(name: str, *, stale: bool = False, after_s: float = 0.0) -> NodeUsage:
    values = {"cpu_percent": 50.0, "memory_used_gb": 2.0, "disk_read_mb_per_s": 3.0}
    values["gpus_idle"] = 1.0
    return NodeUsage(name=name, values=values, time_s=NOW_S + after_s, stale=stale)


def node_status(name: str, left_s: float | None = None) -> NodeStatus:
    return NodeStatus(
        name=name,
        node_id=name,
        ip="127.0.0.1",
        is_head=False,
        joined_s=NOW_S,
        left_s=left_s,
        cpu_count=1,
        memory_gb=1,
        gpus={},
        probed=True,
        error=None,
        facts={},
        resources={},
        labels={},
    )


def test_units_and_labels_are_those_of_prometheus(watch: Watch) -> None:
    """Bytes and seconds; sides and states are labels; what is unknown has no series."""
    live = Live(
        pipelines=[pipeline("xenna")],
        stages=[stage("training/a", loss=0.5, broken=math.nan)],
        nodes=[node("host")],
        all_nodes={"mean/cpu_percent": 50.0, "alive": 1.0, "time_s": 0.0},
        series=25,
        untracked_series=5,
    )
    series = watch.show(live=live)
    part = ("run00001", "xenna", "plan_stage")
    assert series.of("raywb_pipeline_stage_queue") == {(*part, "in"): 3, (*part, "out"): 1}
    assert series.of("raywb_pipeline_stage_memory_bytes") == {part: 2 * 2**30}
    assert series.of("raywb_pipeline_stage_bottleneck") == {part: 1}
    assert "raywb_pipeline_outputs_per_second" not in series.names()
    assert series.of("raywb_stage_value") == {("run00001", "training/a", "loss"): 0.5}
    assert "raywb_stage_steps_per_second" not in series.names()
    assert series.of("raywb_node_percent") == {("host", "cpu"): 50}
    assert series.of("raywb_node_used_bytes") == {("host", "memory"): 2 * 2**30}
    assert series.of("raywb_node_io_bytes_per_second") == {("host", "disk_read"): 3e6}
    assert series.of("raywb_nodes_percent") == {("cpu", "mean"): 50}
    assert series.of("raywb_keys") == {("tracked",): 20, ("untracked",): 5}
    assert series.of("raywb_rows_lost") == {("after_close",): 2}
    assert series.of("raywb_rows_backlog") == {("run00001",): 3}
    [labels] = series.of("raywb_run_info")
    assert labels[-1] == "https://wandb.ai/team/demo/runs/run00001"
    assert series.of("raywb_series_exported") == {(): len(series.series)}


def test_sources_are_counted_by_how_they_are(watch: Watch) -> None:
    """Alive, silent, ended and killed ones are different things."""
    sources = [source("a"), source("b", heard_ago_s=31.0), source("c", ended=True), killed("d")]
    counts = watch.show(sources=sources).of("raywb_sources")
    expected = {"live": 1, "silent": 1, "ended": 1, "killed": 1, "unconfirmed": 0}
    assert counts == {(state,): count for state, count in expected.items()}


def test_a_pipeline_that_is_done_is_shown_for_a_while_and_ends(watch: Watch) -> None:
    """Its last state is exported some times; then all of it ends, and the other one goes on."""
    watch.show(live=Live(pipelines=[pipeline("xenna"), pipeline("xenna/sft_2")]))
    done = Live(pipelines=[pipeline("xenna/sft_2"), pipeline("xenna", "done", 100.0)])
    series = watch.show(5.0, live=done)
    assert series.of("raywb_pipeline_percent")["run00001", "xenna"] == 100
    assert ("run00001", "xenna", "running") not in series.of("raywb_pipeline_state")
    watch.show(LAST_S)
    assert ("run00001", "xenna") in series.of("raywb_pipeline_percent")
    watch.show(1.0)
    left = {labels[1] for name, labels in series.series if name.startswith("raywb_pipeline")}
    assert left == {"xenna/sft_2"}


def test_what_ended_before_a_restart_does_not_come_back(watch: Watch) -> None:
    """A service that is started again does not show what was over long ago."""
    watch.now = LAST_S + 1
    series = watch.show(live=Live(pipelines=[pipeline("xenna", "done", 100.0)]))
    assert "raywb_pipeline_percent" not in series.names()
    assert "raywb_rows_received" in series.names()


def test_a_stage_ends_with_its_sources(watch: Watch) -> None:
    """Closed or killed, the last of them takes its stage's series with it, and its parts'."""
    live = Live(stages=[stage("training/a"), stage("training/a/val"), stage("other")])
    ended = [source("training/a", ended=True), source("hook")]
    watch.show(live=live)
    watch.show(sources=ended)
    series = watch.show(LAST_S + 1)
    assert set(series.of("raywb_stage_step")) == {("run00001", "other")}
    series = watch.show(sources=[source("training/a"), source("hook")])
    assert ("run00001", "training/a") in series.of("raywb_stage_step"), "it came again"


def test_silent_stages_end_in_the_end(watch: Watch) -> None:
    """Nobody says that it is over, and nothing comes for an hour: it is."""
    watch.show(live=Live(stages=[stage("training/a")]))
    watch.show(3600.5)
    series = watch.show(LAST_S + 1)
    assert "raywb_stage_step" not in series.names()
    assert "raywb_rows_received" in series.names()


def test_a_pipeline_that_nobody_ends_ends_all_the_same(watch: Watch) -> None:
    """With the last source that could log to it; or, where others live, when it is silent."""
    live = Live(pipelines=[pipeline("xenna")])
    assert len(watch.show(live=live).of("raywb_pipeline_percent")) == 1
    # Its driver was killed, and nobody else is at work.
    watch.show(5.0, sources=[killed("hook"), killed("training/a")])
    assert watch.show(LAST_S + 1).of("raywb_pipeline_percent") == {}
    # Sources say too little to tell which of them could log to it, so that any may.
    watch = Watch()
    watch.show(PIPELINE_SILENT_S - 1, live=live)
    series = watch.show(LAST_S)
    assert ("run00001", "xenna", "running") in series.of("raywb_pipeline_state")
    series = watch.show(LAST_S + 1)
    assert series.of("raywb_pipeline_state") == series.of("raywb_pipeline_percent") == {}
    assert "raywb_rows_received" in series.names()


def test_vanished_and_stale_nodes_end_at_once(watch: Watch) -> None:
    """A node that left, or that does not answer, has no present state."""
    live = Live(nodes=[node("one"), node("two"), node("three")])
    assert len(watch.show(live=live).of("raywb_node_percent")) == 3
    nodes = [node_status("one"), node_status("three"), node_status("two", NOW_S)]
    # The one that has left is not among those that do not answer, nor is one of long ago.
    usage = [node("one"), node("two", stale=True), node("three", stale=True)]
    live = Live(nodes=[*usage, node("long ago", stale=True)])
    series = watch.show(1.0, live=live, nodes=nodes)
    assert set(series.of("raywb_node_percent")) == {("one", "cpu")}
    assert series.of("raywb_nodes") == {("alive",): 2, ("left",): 1, ("stale",): 1}


def test_nodes_end_when_none_answers_any_more(watch: Watch) -> None:
    """No later reading makes them stale: it is the age of the latest one that tells."""

    def reading(after_s: float) -> Live:
        of_all = {"mean/cpu_percent": 50.0, "time_s": after_s}
        return Live(nodes=[node("one", after_s=after_s)], all_nodes=of_all)

    watch.show(live=reading(0.0))
    series = watch.show(15.0, live=reading(15.0))
    watch.show(SHORTEST_READING_S)
    assert len(series.of("raywb_node_percent")) == len(series.of("raywb_nodes_percent")) == 1
    watch.show(1.0)
    assert series.of("raywb_node_percent") == series.of("raywb_nodes_percent") == {}
    assert series.of("raywb_nodes")["stale",] == 1
    # They answer again, once a minute now: what is said in between is not too old.
    for _ in range(2):
        watch.show(60.0, live=reading(watch.now + 60.0))
    watch.show(READING_INTERVALS * 60.0)
    assert len(series.of("raywb_node_percent")) == len(series.of("raywb_nodes_percent")) == 1
    watch.show(1.0)
    assert series.of("raywb_node_percent") == series.of("raywb_nodes_percent") == {}


def test_means_of_many_nodes_end_when_none_answers(watch: Watch) -> None:
    """Where rows hold means only, their axis says whether they are others."""
    for time_s in (0.0, 15.0):
        of_all = {"mean/cpu_percent": 50.0, "time_s": time_s}
        series = watch.show(15.0, live=Live(all_nodes=of_all))
    assert watch.show(SHORTEST_READING_S).of("raywb_nodes_percent") == {("cpu", "mean"): 50}
    assert series.of("raywb_nodes_percent")
    assert watch.show(1.0).of("raywb_nodes_percent") == {}


def test_everything_ends_with_the_run_and_the_next_one_begins(watch: Watch) -> None:
    """After finish() nothing is left once the last state was shown; a new run has its own label."""
    live = Live(pipelines=[pipeline("xenna")], stages=[stage("training/a")], nodes=[node("one")])
    watch.show(live=live)
    series = watch.show(finished=True, backlog_rows=0)
    assert series.of("raywb_rows_backlog") == {("run00001",): 0}
    assert watch.show(LAST_S + 1).series == {}
    series = watch.show(finished=False, run=run_info(2, "run00002"), live=Live())
    assert set(series.of("raywb_rows_received")) == {("run00002",)}


def test_nobody_has_the_run_any_more(watch: Watch) -> None:
    """A run whose sink rests is over for those who watch, though nobody finished it."""
    watch.show()
    watch.show(sink=SinkStatus(state="resting", applied_rows=5, restarts=0))
    assert watch.show(LAST_S + 1).series == {}


def test_runs_of_stages_have_their_own_series_and_end_for_themselves(watch: Watch) -> None:
    """Their stage is named by their job type, since their keys have no prefix."""
    own = StageRunStatus(
        run=run_info(1_000_000, "own00001", "classify"),
        state="running",
        received_rows=4,
        backlog_rows=1,
        sink=SinkStatus(state="running", applied_rows=3, restarts=0),
    )
    live = Live(stages=[stage("", 1_000_000, accuracy=0.75)])
    sources = [source("classify"), source("hook")]
    series = watch.show(live=live, stage_runs=[own], sources=sources)
    assert series.of("raywb_stage_value") == {("own00001", "classify", "accuracy"): 0.75}
    assert series.of("raywb_rows_received") == {("run00001",): 10, ("own00001",): 4}
    watch.show(stage_runs=[msgspec.structs.replace(own, state="finished")])
    series = watch.show(LAST_S + 1)
    assert series.of("raywb_stage_value") == {}
    assert set(series.of("raywb_rows_received")) == {("run00001",)}


def test_ranks_are_counted(watch: Watch) -> None:
    """How many there are to be, have come, have ended and lag."""
    ranks = StageStatus(
        stage="training/a",
        run_id="run00001",
        world_size=8,
        attached=7,
        ended=1,
        step=3,
        last_row_s=2.0,
        step_s=1.0,
        slow=[],
        slow_ranks=2,
        warning=None,
    )
    counts = watch.show(stages=[ranks]).of("raywb_stage_ranks")
    found = {labels[-1]: count for labels, count in counts.items()}
    assert found == {"expected": 8, "attached": 7, "ended": 1, "slow": 2}


def test_beyond_the_limit_values_go_first_and_old_series_stay(watch: Watch) -> None:
    """Ray is never given more; the rest is counted, and what was there is not pushed out."""

    def many(first: int) -> list[StageProgress]:
        numbers = range(first, first + 60)
        return [stage(f"s{n}", **{f"k{key}": 1.0 for key in range(64)}) for n in numbers]

    series = watch.show(live=Live(stages=many(0)))
    assert len(series.series) == MAX_SERIES
    before = set(series.of("raywb_stage_value"))
    assert len(series.of("raywb_stage_step")) == 60
    [dropped] = series.of("raywb_series_dropped").values()
    assert len(before) + dropped == 60 * 64
    assert watch.sink.warnings[0].startswith(f"{dropped:g} series are beyond the {MAX_SERIES}")
    # The order of stages changes all the time: the latest row is the first.
    kept = set(watch.show(live=Live(stages=many(0)[::-1])).of("raywb_stage_value"))
    assert kept == before
    # A pipeline that comes now has its place all the same.
    series = watch.show(live=Live(stages=many(0), pipelines=[pipeline("xenna")]))
    assert "raywb_pipeline_percent" in series.names()
    assert len(series.series) == MAX_SERIES
    series = watch.show(live=Live())
    assert series.of("raywb_series_dropped") == {(): 0}
    assert watch.sink.warnings == []


def test_labels_are_what_ray_takes() -> None:
    """Printable ASCII of bounded length, the same for the same text, different for others."""
    assert clean_label("training/a") == "training/a"
    assert clean_label("Schüler").startswith("Schuler~")
    assert clean_label("Schüler") != clean_label("Schu\u0308ler") != clean_label("Schuler")
    assert clean_label("学") != clean_label("校")
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    texts = {
        "".join(chr(dice.randrange(0x11000)) for _ in range(dice.randrange(2 * MAX_LABEL_CHARS)))
        for _ in range(300)
    } | {"\ud800", "a\nb", 'a"b\\c', "x" * MAX_LABEL_CHARS, "x" * (MAX_LABEL_CHARS + 1)}
    cleaned = {clean_label(text) for text in texts}
    assert len(cleaned) == len(texts)
    for text in cleaned:
        assert text.isascii()
        assert text.isprintable()
        assert len(text) <= MAX_LABEL_CHARS


def test_a_failure_of_rays_is_counted_and_ends_nothing(watch: Watch) -> None:
    """Whatever Ray raises becomes a warning in the status; later rounds set what they can."""
    watch.recorder.error = RuntimeError("no core worker")
    watch.show()
    [warning] = watch.sink.warnings
    assert "no core worker" in warning
    watch.recorder.error = None
    assert "raywb_rows_received" in watch.show().names()
    assert watch.sink.warnings == [warning]


def test_a_series_that_ray_refuses_keeps_no_other_from_it(watch: Watch) -> None:
    """The others are set and ended in the same round; each refusal is counted."""
    live = Live(pipelines=[pipeline("xenna")])
    wanted = set(watch.show(live=live).series)
    watch = Watch()
    refused = ("raywb_run_info", next(labels for name, labels in wanted if name.endswith("info")))
    watch.recorder.error, watch.recorder.refused = ValueError("odd label"), {refused}
    watch.show(live=live)
    series = watch.show()
    assert set(series.series) == wanted - {refused}
    [warning] = watch.sink.warnings
    assert "could not be set 2 times" in warning
    assert "odd label" in warning
    # One that Ray would not end is ended as soon as it lets itself be.
    kept = ("raywb_pipeline_percent", ("run00001", "xenna"))
    watch.recorder.refused = {kept}
    series = watch.show(live=Live())
    assert {key for key in series.series if key[0].startswith("raywb_pipeline")} == {kept}
    watch.recorder.error = None
    assert kept not in watch.show().series


def test_what_stays_the_same_is_set_again_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray forgets what it exported: the thread sets it in every round, and rests after the end."""
    monkeypatch.setattr(ray_metrics_sink, "SHORTEST_ROUND_S", 0.01)
    recorder = Recorder()
    recorder.export_interval_s = 0.02
    sink = RayMetricsSink(recorder, wall_clock=lambda: NOW_S)
    try:
        sink.show(status())
        for _ in range(5):
            assert recorder.rounds.acquire(timeout=10), "a value was set once and never again"
        sink.show(status(finished=True))
        assert recorder.empty.wait(10), "a run that is over does not end"
        while recorder.rounds.acquire(blocking=False):
            pass
        assert not recorder.rounds.acquire(timeout=0.1), "a run that is over is still shown"
        sink.show(status())
        assert recorder.rounds.acquire(timeout=10), "the next run is not shown"
    finally:
        sink.close()


def test_a_round_that_takes_long_is_followed_by_the_next_at_once() -> None:
    """On a busy machine it may take longer than a pause: series must not end meanwhile."""
    recorder = Recorder()
    now = 0.0

    def wall_clock() -> float:
        """It is asked in every round, and then the round has taken longer than it may; in a
        pause no time passes, so one would never end."""
        nonlocal now
        now += 2 * ray_metrics_sink.LONGEST_ROUND_S
        return NOW_S

    sink = RayMetricsSink(recorder, clock=lambda: now, wall_clock=wall_clock)
    try:
        sink.show(status())
        for _ in range(5):
            assert recorder.rounds.acquire(timeout=10), "it pauses though the next one is due"
    finally:
        sink.close()


def test_close_is_not_lost_when_it_comes_between_two_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is just before the thread forgets that it was woken: the thread ends all the same."""
    # Nothing is shown of a run that is over, so that the thread would wait for somebody to come.
    monkeypatch.setattr(ray_metrics_sink, "LAST_EXPORTS", -1)
    sink = RayMetricsSink(Recorder(), wall_clock=lambda: NOW_S)
    closing = threading.Thread(target=sink.close, daemon=True)
    woken = threading.Event()

    class Wake(threading.Event):
        def set(self) -> None:
            super().set()
            if threading.current_thread() is closing:
                woken.set()

        def clear(self) -> None:
            if not closing.is_alive() and not woken.is_set():
                closing.start()
                assert woken.wait(10)
            super().clear()

    sink._wake = Wake()
    sink.show(status(finished=True))
    assert woken.wait(10)
    closing.join(10)
    assert not closing.is_alive(), "close() waits for ever"


def test_every_name_is_in_use_and_explained(watch: Watch) -> None:
    """The table has no name that nothing is said under, and each has one sentence or more."""
    full = msgspec.structs.replace(
        stage("training/a"), steps_per_s=1.0, slowest_rank=1, rank_spread_s=0.5
    )
    busy = pipeline("xenna")
    part = msgspec.structs.replace(busy.stages[0], speed_tasks_per_s=1.0, cpu_percent=1.0)
    busy = msgspec.structs.replace(busy, inputs_per_s=1.0, outputs_per_s=1.0, stages=[part])
    ranks = StageStatus(
        stage="training/a",
        run_id="run00001",
        world_size=1,
        attached=1,
        ended=0,
        step=1,
        last_row_s=None,
        step_s=None,
        slow=[],
        slow_ranks=0,
        warning=None,
    )
    of_all = {"mean/cpu_percent": 1.0, "time_s": 0.0}
    live = Live(pipelines=[busy], stages=[full], nodes=[node("one")], all_nodes=of_all)
    assert watch.show(live=live, stages=[ranks]).names() == set(METRICS)
    assert all(metric.description.endswith((".", ":")) for metric in METRICS.values())


def test_the_status_is_asked_for_only_while_there_is_something_new() -> None:
    """Nothing new: seldom, since sources may fall silent; and after the run's end not at all."""
    recorder = Recorder()
    recorder.export_interval_s = 0.0
    now = 0.0
    sink = RayMetricsSink(recorder, clock=lambda: now, wall_clock=lambda: NOW_S)
    rows, finished, asked = 0, False, 0
    looked = asyncio.Semaphore(0)

    async def make() -> Status:
        nonlocal asked
        asked += 1
        return status(finished=finished)

    def changes() -> int:
        looked.release()
        return rows

    async def look() -> int:
        """How often the status is asked for in some rounds, however long they take."""
        nonlocal asked
        asked = 0
        for _ in range(3):
            await asyncio.wait_for(looked.acquire(), 30)
        return asked

    async def watch() -> None:
        nonlocal rows, finished, now
        serving = asyncio.create_task(sink.serve(make, changes))
        assert await look() == 1
        assert await look() == 0
        rows += 1
        assert await look() == 1
        now += ray_metrics_sink.RENEW_S
        assert await look() == 1
        rows, finished = rows + 1, True
        assert await look() == 1
        now += 100 * ray_metrics_sink.RENEW_S
        assert await look() == 0
        rows += 1
        assert await look() == 1
        serving.cancel()

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray_metrics_sink, "SHORTEST_ROUND_S", 0.02)
            patch.setattr(ray_metrics_sink, "LOOP_SHARE", 1.0)
            asyncio.run(watch())
    finally:
        sink.close()
