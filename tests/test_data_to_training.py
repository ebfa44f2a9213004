"""From text to a trained model with one command, in one W&B run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_cluster import clean_environment
from wandb_file import NODE_KEYS, WandbRun, read_runs

pytest.importorskip("torch", reason="the lane for the newest cosmos-xenna has no torch")

STEPS = 12

#: Of both recipes: as much as takes a minute.
SMALL = (
    *("input.shard_bytes=100000", "observability.pipeline_logging_interval_s=1"),
    *(f"train.steps={STEPS}", "train.batch_size=8", "train.optimizer.warmup_steps=2"),
    *(f"train.validation.every_steps={STEPS // 2}", f"train.checkpoints.every_steps={STEPS // 2}"),
)


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, since Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


def run_recipe(home: Path, name: str, *words: str) -> str:
    """Run ``python -m recipes.<name> tiny`` as a user does, and return what it printed."""
    with subprocess.Popen(
        [sys.executable, "-m", f"recipes.{name}", "tiny", f"output_dir={name}", *words, *SMALL],
        cwd=home,
        env={
            **clean_environment(home),
            "RAY_TMPDIR": str(home),
            # Workers wait two seconds for Ray Train's controller at each checkpoint otherwise.
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        },
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


def rows_of(run: WandbRun, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage, with keys relative to it."""
    return [
        {key.removeprefix(f"{stage}/"): value for key, value in row.items()}
        for row in run.history
        if f"{stage}/step" in row
    ]


def run_of(home: Path, name: str) -> WandbRun:
    """The one run of a recipe, after a look at what any of them has."""
    record = json.loads((home / name / "run.json").read_text())
    (run,) = read_runs(home / "raywb" / f"raywb-{name}").values()
    assert (run.run_id, run.project, run.exit_code) == (record["id"], f"raywb-{name}", 0)
    pipeline = [row for row in run.history if "xenna/progress" in row]
    assert pipeline[-1]["xenna/progress"] == 100
    assert [row for row in run.history if any(key.startswith(NODE_KEYS) for key in row)]
    training = rows_of(run, f"training/{name}")
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    assert all(row["ranks"] == 2 for row in training)
    assert training[-1]["loss"] < training[0]["loss"]
    assert [row["step"] for row in rows_of(run, f"validation/{name}")] == [STEPS // 2, STEPS]
    for prefix in (f"training/{name}", f"validation/{name}"):
        assert run.metrics[f"{prefix}/*"].step_metric == f"{prefix}/step"
    assert run.config[f"{name}/data_prep"]["train"]["steps"] == STEPS
    return run


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_one_command_prepares_and_trains_in_one_run(home: Path) -> None:
    """Each recipe's run has its pipeline, the nodes and its training, each on its own axis.

    The fine-tuning begins with the weights of the pretraining, so it knows more than nothing.
    """
    printed = run_recipe(home, "pretrain", "input.limit_bytes=300000", "train.context_tokens=64")
    assert f"{STEPS} steps: loss" in printed
    pretrained = rows_of(run_of(home, "pretrain"), "training/pretrain")

    printed = run_recipe(
        home,
        "sft",
        *("input.limit_bytes=400000", "packing.pack_size=256"),
        *("tokenizer.source=pretrain", "train.init_from=pretrain"),
    )
    assert f"{STEPS} steps: loss" in printed
    tuned = rows_of(run_of(home, "sft"), "training/sft")
    assert tuned[0]["loss"] < pretrained[0]["loss"]
