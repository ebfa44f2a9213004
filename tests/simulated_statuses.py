"""Statuses as a service would give them, for pictures of clusters that no test can start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from raywb.live import (
    Live,
    NodeUsage,
    PipelineProgress,
    PipelineStageProgress,
    StageProgress,
)
from raywb.reports import (
    NodeStatus,
    RankStatus,
    RunInfo,
    SinkStatus,
    SourceStatus,
    StageStatus,
    Status,
    UnconfirmedSource,
)

__all__ = ["NOW_S", "PATH", "busy", "empty", "hostile", "huge", "with_nodes"]

NOW_S = 1_700_000_000.0

#: What a process needs on its path to show one of these.
PATH = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

#: What a name may hold that must not reach a terminal, or be taken for markup; and wide characters.
HOSTILE = "[red]x[/] [/nothing] \x1b[2J\x1b]0;title\x07\r\n:smile: \u202e訓練データ\u200b"


def empty(**changes: Any) -> Status:
    """A service that was just started."""
    run = RunInfo(
        project="demo",
        id="k3j9x2ab",
        name="demo-run",
        mode="offline",
        dir="/home/someone/raywb/demo/k3j9x2ab",
        group="slurm-12345",
        group_source="SLURM_JOB_ID",
    )
    status = Status(
        version="0.1.0",
        run=run,
        finished=False,
        address="10.0.0.1:40123",
        incarnation=1,
        received_rows=0,
        outbox_rows=0,
        backlog_rows=0,
        lost={},
        rejected=0,
        after_finish_rows=0,
        sink=SinkStatus(state="running", applied_rows=0, restarts=0),
        sources=[],
        problems=[],
    )
    return msgspec.structs.replace(status, **changes)


def _pipeline_stage(name: str, done: int, known: int, **more: Any) -> PipelineStageProgress:
    values = {
        "queue_in": 12,
        "queue_out": 3,
        "slots_used": 2,
        "slots_empty": 0,
        "actors_ready": 4,
        "actors_pending": 0,
        "speed_tasks_per_s": 2.125,
        "cpu_percent": 87.0,
        "memory_gb": 3.25,
    }
    return PipelineStageProgress(
        name=name, tasks_completed=done, tasks_known=known, **{**values, **more}
    )


def pipeline(name: str = "xenna", **changes: Any) -> PipelineProgress:
    """One that runs; its second stage holds it up."""
    stages = [
        _pipeline_stage("plan_stage", 1000, 1000, queue_in=0, slots_used=0),
        _pipeline_stage("download_stage", 430, 1000, is_bottleneck=True),
        _pipeline_stage("bin_idx_tokenization_stage", 400, 433, actors_pending=2),
    ]
    values: dict[str, Any] = {
        "state": "running",
        "percent": 61.2,
        "duration_s": 125.0,
        "inputs_left": 570,
        "outputs": 400,
        "inputs_per_s": 3.44,
        "outputs_per_s": 3.2,
        "stages": stages,
        "time_s": NOW_S - 4,
    }
    return PipelineProgress(name=name, run=1, **{**values, **changes})


def stage(name: str, **changes: Any) -> StageProgress:
    """One that trains."""
    history = [4 * math.exp(-n / 40) + 0.1 * math.sin(n) for n in range(110)]
    values: dict[str, Any] = {
        "step": 12_345.0,
        "steps_per_s": 4.0,
        "metrics": {"loss": history[-1], "lr": 1e-4},
        "main": "loss",
        "history": history,
        "time_s": NOW_S - 1,
        "ranks": 8,
        "slowest_rank": 3,
        "rank_spread_s": 0.1234,
    }
    return StageProgress(stage=name, run=1, **{**values, **changes})


def node(name: str, **changes: Any) -> NodeStatus:
    """One with eight GPUs."""
    values: dict[str, Any] = {
        "node_id": f"id of {name}",
        "ip": "10.0.0.1",
        "is_head": name == "head",
        "joined_s": NOW_S - 1000,
        "left_s": None,
        "cpu_count": 64.0,
        "memory_gb": 512.0,
        "gpus": {"NVIDIA H100": 8},
        "probed": True,
        "error": None,
        "facts": {"versions": {"python": "3.11.7", "ray": "2.60.0"}},
        "resources": {},
        "labels": {},
    }
    return NodeStatus(name=name, **{**values, **changes})


def _usage(name: str, cpu: float, *, stale: bool = False) -> NodeUsage:
    values = {
        "cpu_percent": cpu,
        "memory_percent": cpu / 2 + 48,
        "gpu_percent": 100 - cpu,
        "gpu_memory_percent": 71.0,
        "disk_percent": 31.0,
    }
    return NodeUsage(name=name, values=values, time_s=NOW_S - 5 - 60 * stale, stale=stale)


def source(number: int, **changes: Any) -> SourceStatus:
    """One process that logs."""
    values: dict[str, Any] = {
        "hostname": f"node-{number % 100}",
        "node_id": "n",
        "pid": 1000 + number,
        "stages": ["training/pretrain"],
        "received_bytes": 1,
        "received_rows": 1543,
        "heard_ago_s": 0.5,
        "ended": False,
    }
    return SourceStatus(source_id=f"{number:032x}", **{**values, **changes})


def busy(**changes: Any) -> Status:
    """A pipeline and a training on three nodes; something of everything is wrong."""
    ranks = StageStatus(
        stage="training/pretrain",
        run_id="k3j9x2ab",
        world_size=8,
        attached=8,
        ended=0,
        step=12_345,
        last_row_s=0.5,
        step_s=0.3,
        slow=[RankStatus(rank=5, step=12_300, silent_s=44.0, hostname="a", pid=7, reason="lags")],
        slow_ranks=1,
        warning="training/pretrain: rank 5 (a pid 7) at step 12300 logged nothing for 44 s",
    )
    run = msgspec.structs.replace(
        empty().run, mode="online", url="https://wandb.ai/some-team/demo/runs/k3j9x2ab"
    )
    live = Live(
        pipelines=[pipeline(), pipeline("xenna/sft_2", state="done", percent=100, inputs_left=0)],
        stages=[
            stage("training/pretrain"),
            stage(
                "validation/pretrain",
                step=12_000.0,
                steps_per_s=0.05,
                ranks=None,
                slowest_rank=None,
                rank_spread_s=None,
                time_s=NOW_S - 21,
            ),
            stage(
                "pretrain",
                step=None,
                steps_per_s=None,
                main="rows_in",
                ranks=None,
                metrics={"rows_in": 123456.0},
                history=[123456.0],
                slowest_rank=None,
                time_s=NOW_S - 4000,
            ),
        ],
        nodes=[_usage("gpu-a", 97.0), _usage("gpu-b", 41.0, stale=True), _usage("head", 12.0)],
        all_nodes={"alive": 3, "answered": 2, "gpu_idle_share": 0.125},
        series=88,
    )
    status = empty(
        run=run,
        received_rows=98_765,
        outbox_rows=12_400,
        backlog_rows=55,
        lost={"disk_full": 3},
        rejected=2,
        sink=SinkStatus(state="running", applied_rows=12_400, restarts=1, confirmed_rows=12_345),
        sources=[
            *(source(n) for n in range(8)),
            source(8, heard_ago_s=95.0),
            source(9, ended=True, killed=True, heard_ago_s=None),
        ],
        unconfirmed=[UnconfirmedSource(source_id="f" * 32, node_id="n", unacknowledged_rows=7)],
        nodes=[node("head", gpus={}), node("gpu-a"), node("gpu-b"), node("gone", left_s=NOW_S)],
        stages=[ranks],
        warnings=[ranks.warning or ""],
        problems=["W&B's server answered 403 to the last three requests of the run's file stream"],
        live=live,
    )
    return msgspec.structs.replace(status, **changes)


def huge(many: int = 1_000) -> Status:
    """As many nodes, sources, stages and pipelines."""
    kinds = {"cpu_percent": (43.0, 2.0, 99.0), "memory_percent": (60.0, 11.0, 98.5)}
    kinds |= {"gpu_percent": (81.0, 0.0, 100.0), "gpu_memory_percent": (70.0, 0.0, 96.0)}
    all_nodes = {"alive": float(many), "answered": many - 4.0, "gpu_idle_share": 0.031}
    for key, values in kinds.items():
        for kind, value in zip(("mean", "min", "max"), values, strict=True):
            all_nodes[f"{kind}/{key}"] = value
    live = Live(
        pipelines=[
            pipeline(f"xenna/sft_{n}", state="running" if n < 9 else "done") for n in range(50)
        ],
        stages=[stage(f"workers/worker_{n:04d}", time_s=NOW_S - n / 10) for n in range(100)],
        all_nodes=all_nodes,
        series=20_000,
        more_pipelines=150,
        more_stages=many - 100,
    )
    return busy(
        live=live,
        sources=[source(n, heard_ago_s=60.0 if n < 7 else 0.5) for n in range(many)],
        nodes=[node(f"node-{n:04d}") for n in range(many)],
        warnings=[f"warning {n}" for n in range(30)],
        problems=[f"problem {n}" for n in range(30)],
        received_rows=123_456_789,
        outbox_rows=45_678_901,
        backlog_rows=12_345_678,
    )


def with_nodes(many: int, **all_nodes: float) -> Status:
    """So many nodes without GPUs that were read 5 s ago, and nothing else."""
    names = [f"n{number:02}" for number in range(many)]
    live = Live(
        nodes=[_usage(name, 20.0 + number) for number, name in enumerate(names)],
        all_nodes={"alive": float(many), "answered": float(many), **all_nodes},
    )
    return empty(nodes=[node(name, gpus={}) for name in names], live=live)


def hostile() -> Status:
    """Names and errors that a terminal must not obey."""
    evil = HOSTILE * 3
    status = busy()
    live = msgspec.structs.replace(
        status.live,
        pipelines=[
            pipeline(evil, stages=[_pipeline_stage(evil, 1, 2, is_bottleneck=True)]),
            pipeline(evil, state="failed", error=evil),
        ],
        stages=[
            stage(evil, main=evil, metrics={evil: math.nan}, history=[1.0, math.nan, math.inf])
        ],
        nodes=[_usage(evil, 97.0)],
    )
    run = msgspec.structs.replace(
        status.run, name=evil, group=evil, group_source=evil, url=evil, dir=evil, job_type=evil
    )
    return msgspec.structs.replace(
        status,
        run=run,
        live=live,
        lost={evil: 1},
        sources=[source(1, hostname=evil, stages=[evil])],
        nodes=[node(evil, facts={"cloud": {"instance_type": evil}, "versions": {"ray": evil}})],
        sink=SinkStatus(state="retrying", applied_rows=1, restarts=2, last_error=evil),
        stages=[msgspec.structs.replace(status.stages[0], stage=evil, warning=evil)],
        unconfirmed=[UnconfirmedSource(source_id=evil, node_id=evil, hostname=evil, reason=evil)],
        undelivered_updates=[evil],
        warnings=[evil],
        problems=[evil],
    )
