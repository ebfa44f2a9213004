"""The main job as a user types it, read back from what it leaves on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from spec_metrics import PIPELINE_METRICS, STAGE_METRICS, STAGE_SPEED
from wandb_file import WandbRun, read_runs

REPOSITORY = Path(__file__).parent.parent
STAGES = ("plan_stage", "download_stage", "bin_idx_tokenization_stage")

#: All that a run of the main job has; a stage's are below ``stage/<name>/``.
EVERY_METRIC = PIPELINE_METRICS | {"bottleneck_stage_index", "hook_errors"}
EVERY_STAGE_METRIC = STAGE_METRICS | {STAGE_SPEED}


class Job:
    """``python -m recipes.pretrain`` in a home of its own."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        self.output = home / "out"
        self.metrics = self.output / "pipeline_stats.jsonl"
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("WANDB_", "RAYWB_", "RAY_", "SLURM_", "SUBMITIT_"))
        }
        # Ray's sockets have a path limit, so its directory cannot lie below pytest's.
        environment |= {"HOME": str(home), "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": str(home)}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "recipes.pretrain",
                "tiny",
                f"output_dir={self.output}",
                "observability.pipeline_logging_interval_s=1",
                "train.enabled=false",
                *arguments,
            ],
            cwd=home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, timeout_s: float = 400.0) -> str:
        """Wait for the end; returns what it printed."""
        printed, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, printed
        return printed

    @property
    def run_directory(self) -> Path:
        (directory,) = (self.home / "raywb" / "raywb-pretrain").iterdir()
        return directory

    def run(self) -> WandbRun:
        """The one W&B run of the job."""
        (run,) = read_runs(self.home).values()
        return run

    def records(self) -> list[dict]:
        """The JSONL; what W&B has in the summary only, the bottleneck's name, apart."""
        records = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return [
            {**record, "bottleneck_stage": record["metrics"].pop("bottleneck_stage", None)}
            for record in records
        ]

    def end(self) -> None:
        """End whatever of it is still there."""
        try:
            processes = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            processes = []
        self.process.kill()
        self.process.wait()
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


def pipeline_rows(run: WandbRun) -> list[dict]:
    """The pipeline's rows, with the keys that JSONL has for them."""
    return [
        {key.removeprefix("xenna/"): value for key, value in row.items() if key[0] != "_"}
        for row in run.history
        if "xenna/progress" in row
    ]


def idx_tokens(path: Path) -> int:
    """Tokens of one shard, from the lengths in its index."""
    content = path.read_bytes()
    assert content[:9] == b"MMIDIDX\0\0"
    count = int.from_bytes(content[18:26], "little")
    return int(np.frombuffer(content, np.int32, count, 34).sum())


@pytest.mark.ray
@pytest.mark.xenna
@pytest.mark.timeout(600)
def test_the_main_job_tells_the_truth(home: Path) -> None:
    """One command leaves shards, JSONL and one W&B run which agree, up to the last point."""
    # So many shards that no stage runs far ahead: each is seen at work, and has a speed.
    job = Job(home, "input.shard_bytes=30000")
    try:
        printed = job.wait()
    finally:
        job.end()
    run, records = job.run(), job.records()
    shards = sorted(job.output.glob("**/*.idx"))
    tokens = sum(idx_tokens(path) for path in shards)
    assert len(shards) > 3
    assert tokens > 100_000

    assert (run.project, run.job_type, run.exit_code) == ("raywb-pretrain", "orchestrator", 0)
    assert run.group.startswith("ray-cluster-")
    names = EVERY_METRIC | {
        f"stage/{stage}/{name}" for stage in STAGES for name in EVERY_STAGE_METRIC
    }
    rows = pipeline_rows(run)
    seen = set().union(*rows)
    assert names <= seen, f"missing: {sorted(names - seen)}"
    assert run.metrics["xenna/*"].step_metric == "xenna/pipeline_duration_s"

    last = rows[-1]
    assert last["progress"] == 100
    assert last["num_input_remaining"] == 0
    assert last["num_outputs"] == len(shards)
    assert [last[f"stage/{stage}/tasks_completed"] for stage in STAGES] == [len(shards)] * 3
    assert last["hook_errors"] == 0
    progress = [row["progress"] for row in rows]
    assert progress == sorted(progress)
    assert all(value < 100 for value in progress[:-1])
    durations = [row["pipeline_duration_s"] for row in rows]
    assert durations == sorted(durations)

    assert [record["metrics"] for record in records] == rows
    assert [record.get("final", False) for record in records] == [False] * (len(rows) - 1) + [True]
    assert records[-1]["stages"] == ["PlanStage", "DownloadStage", "BinIdxTokenizationStage"]
    assert records[-1]["bottleneck_stage"] == run.summary["xenna/bottleneck_stage"]
    assert {record["pipeline_kind"] for record in records} == {"pretrain"}

    receipts = [json.loads(path.read_text()) for path in job.output.glob("receipts/*.json")]
    assert len(receipts) == len(shards)
    summary = run.summary
    assert summary["pretrain/data_prep/tokens"] == tokens
    assert summary["pretrain/data_prep/tokens"] == sum(r["tokens"] for r in receipts)
    assert summary["pretrain/data_prep/rows_in"] == sum(r["rows_in"] for r in receipts)
    assert summary["xenna/progress"] == 100
    assert summary["xenna/bottleneck_stage"] in STAGES
    assert summary["raywb/rejected"] == 0
    blend = json.loads((job.output / "blend.json").read_text())
    assert str(len(shards)) in printed
    assert f"{tokens:,}" in printed
    assert str(job.run_directory) in printed
    prefixes, weights = blend["blend"][1::2], blend["blend"][::2]
    assert [job.output / f"{prefix}.idx" for prefix in prefixes] == shards
    assert [float(weight) for weight in weights] == [idx_tokens(path) for path in shards]


@pytest.mark.ray
@pytest.mark.xenna
@pytest.mark.timeout(600)
def test_a_killed_service_costs_nothing(home: Path) -> None:
    """The service's process killed in the middle: every snapshot is in the run, once, in order."""
    job = Job(home)
    try:
        service = _service_with_rows(job)
        service.send_signal(signal.SIGKILL)
        killed_at = len(job.records())
        job.wait()
    finally:
        job.end()
    run, records = job.run(), job.records()
    assert len(records) > killed_at
    assert [record["metrics"] for record in records] == pipeline_rows(run)
    assert run.exit_code == 0
    assert run.summary["xenna/progress"] == 100
    assert run.summary["pretrain/data_prep/shards"] == len(list(job.output.glob("**/*.idx")))
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    state = json.loads((job.run_directory / "service.json").read_text())
    assert state["incarnation"] == 2
    assert len(state["runs"]) == 1


def _service_with_rows(job: Job) -> psutil.Process:
    """The service's process, once the pipeline's first rows have come to it."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert job.process.poll() is None, job.wait()
        if job.metrics.exists() and len(job.metrics.read_text().splitlines()) >= 2:
            for process in psutil.Process(job.process.pid).children(recursive=True):
                if "RaywbService" in " ".join(process.cmdline()):
                    return process
        time.sleep(0.05)
    raise AssertionError("no rows came to the service")
