"""From text to a trained model with one command, in one W&B run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_cluster import clean_environment
from wandb_file import NODE_KEYS, read_runs

pytest.importorskip("torch", reason="the lane for the newest cosmos-xenna has no torch")

STEPS = 12


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, since Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


def run_recipe(home: Path, *words: str) -> str:
    """Run ``python -m recipes.pretrain tiny`` as a user does, and return what it printed."""
    with subprocess.Popen(
        [sys.executable, "-m", "recipes.pretrain", "tiny", "output_dir=out", *words],
        cwd=home,
        env={**clean_environment(home), "RAY_TMPDIR": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        started = psutil.Process(process.pid)
        try:
            printed, _ = process.communicate(timeout=280)
        finally:
            for one in [*started.children(recursive=True), started] if started.is_running() else []:
                one.kill()
    assert process.returncode == 0, printed
    return printed


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_one_command_prepares_and_trains_in_one_run(home: Path) -> None:
    """The run has the pipeline, the nodes and the training, each on its own axis, to the last.

    The same command again has nothing to do; with more steps it goes on, in the same run.
    """
    small = (
        *("input.limit_bytes=200000", "input.shard_bytes=50000", "tokenizer.vocab_size=600"),
        *("train.validation.every_steps=6", "train.checkpoints.every_steps=6"),
        *("train.context_tokens=64", "train.batch_size=8", "train.optimizer.warmup_steps=2"),
        "observability.pipeline_logging_interval_s=1",
    )
    printed = run_recipe(home, *small, f"train.steps={STEPS}")
    assert f"{STEPS} steps: loss" in printed
    record = json.loads((home / "out" / "run.json").read_text())
    (run,) = read_runs(home).values()
    assert (run.run_id, run.project, run.exit_code) == (record["id"], "raywb-pretrain", 0)

    pipeline = [row for row in run.history if "xenna/progress" in row]
    assert pipeline[-1]["xenna/progress"] == 100
    assert [row for row in run.history if any(key.startswith(NODE_KEYS) for key in row)]
    training = [row for row in run.history if "training/pretrain/step" in row]
    assert [row["training/pretrain/step"] for row in training] == list(range(1, STEPS + 1))
    assert all(row["training/pretrain/ranks"] == 2 for row in training)
    assert training[-1]["training/pretrain/loss"] < training[0]["training/pretrain/loss"]
    validation = [row for row in run.history if "validation/pretrain/step" in row]
    assert [row["validation/pretrain/step"] for row in validation] == [6, STEPS]
    for prefix in ("training/pretrain", "validation/pretrain"):
        assert run.metrics[f"{prefix}/*"].step_metric == f"{prefix}/step"
    assert run.config["pretrain/data_prep"]["train"]["steps"] == STEPS

    printed = run_recipe(home, *small, f"train.steps={STEPS + 3}")
    assert " 0 made now, " in printed
    assert f"{STEPS + 3} steps, from step {STEPS} on: loss" in printed
    (run,) = read_runs(home).values()
    assert run.run_id == record["id"]
    steps = [
        row["training/pretrain/step"] for row in run.history if "training/pretrain/step" in row
    ]
    assert steps == list(range(1, STEPS + 4))
    assert run.steps == list(range(len(run.history)))
