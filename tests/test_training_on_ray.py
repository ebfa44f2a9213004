"""Training on real clusters: what is in the W&B run, whatever was killed meanwhile."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_cluster import RayCluster, until
from training_case import write_data
from wandb_file import WandbRun, read_runs

from recipes.training.checkpoints import CheckpointFolder

pytest.importorskip("torch", reason="the lane for the newest cosmos-xenna has no torch")

STEPS = 60

#: The controller of Ray Train asks its workers for reports every two seconds otherwise, and each
#: worker waits with its next one.
OFTEN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}

#: The same command each time, as far as the pretraining is concerned.
DRIVER = """
from pathlib import Path
from ray_cluster import report
from training_case import train_as_a_recipe
report(train_as_a_recipe(Path({root!r}), steps={steps}))
"""


def rows_of(run: WandbRun, stage: str) -> list[dict[str, Any]]:
    """The rows of a stage, with keys relative to it."""
    return [
        {key.removeprefix(f"{stage}/"): value for key, value in row.items()}
        for row in run.logged
        if f"{stage}/step" in row
    ]


@pytest.mark.ray
def test_killed_worker_and_killed_cluster(cluster: RayCluster, tmp_path: Path) -> None:
    """Training goes on from the newest checkpoint in the same run: nothing twice, no row missing.

    First a worker is killed, then the whole cluster with the driver; the same command on another
    cluster brings it to its end, and once more finds nothing to do.
    """
    seed = time.time_ns()
    print(f"seed {seed}")
    root = tmp_path / "out"
    write_data(root)
    folder = CheckpointFolder(root / "checkpoints")

    def step_reached(step: int) -> int | None:
        newest = folder.newest()
        return newest.standing.step if newest and newest.standing.step >= step else None

    script = DRIVER.format(root=str(root), steps=STEPS)
    with RayCluster.start() as first:
        driver = first.driver(script, OFTEN)
        until("a checkpoint", lambda: step_reached(10))
        workers = first.processes("RayTrainWorker")
        random.Random(seed).choice(workers).kill()
        # The other one may be at its next checkpoint, and ends when it finds itself alone.
        until("the end of all workers", lambda: not any(one.is_running() for one in workers))
        from_step = step_reached(10)
        assert from_step is not None
        until("later checkpoints", lambda: step_reached(from_step + 20))
        first.kill()
        again_from_step = step_reached(from_step + 20)
        assert again_from_step is not None
        print(driver.output)
        driver = cluster.driver(script + script.splitlines()[-1], OFTEN)
        done, nothing = (driver.next_report() for _ in range(2))
        assert driver.wait() == 0
        print(driver.output)
        runs = read_runs(done["dir"])

    assert done["report"] == nothing["report"] == {"complete": True, "lost": {}}
    assert (done["steps"], done["resumed_from"], done["workers"]) == (STEPS, again_from_step, 2)
    assert (nothing["steps"], nothing["workers"]) == (STEPS, 0)
    assert nothing["losses"] == done["losses"]
    assert nothing["run_id"] == done["run_id"]
    (run,) = runs.values()
    assert run.steps == list(range(len(run.history)))
    check_training(run, from_step, again_from_step, done)


def check_training(
    run: WandbRun, from_step: int, again_from_step: int, done: dict[str, Any]
) -> None:
    rows = rows_of(run, "training/pretrain")
    logged = Counter[int]()
    losses: dict[int, list[float]] = {}
    for row in rows:
        logged[row["step"]] += row["ranks"]
        if row["ranks"] == 2:
            losses.setdefault(row["step"], []).append(row["loss"])
            assert {"slowest_rank", "grad_norm", "learning_rate", "rank_spread_s"} <= row.keys()
            assert row["tokens_per_s"] >= 2 * 4 * 16 / row["step_time_s"] * 0.99
    parts = [(0, from_step), (from_step, again_from_step), (again_from_step, STEPS)]
    for begin, end in parts:
        # Each step by both ranks, and before that by as many as had logged it when one was killed.
        counts = [logged[step] for step in range(begin + 1, end + 1)]
        assert counts == sorted(counts, reverse=True), counts
        assert set(counts) <= ({2} if begin == 0 else {2, 3, 4})
        assert counts.count(3) <= 1
    assert max(logged) == STEPS
    for step, found in losses.items():
        assert found == pytest.approx([found[0]] * len(found), rel=1e-3), f"another batch at {step}"
    assert losses[STEPS][-1] < losses[1][0] / 2
    validations = rows_of(run, "validation/pretrain")
    assert {row["step"] for row in validations} == set(range(10, STEPS + 1, 10))
    assert all(row["ranks"] == 2 and row["tokens"] == 256 for row in validations)
    assert validations[-1]["loss"] < validations[0]["loss"]
    summary = {key: run.summary[f"training/pretrain/{key}"] for key in ("last_loss", "best_loss")}
    assert summary == {"last_loss": done["losses"]["last"], "best_loss": done["losses"]["best"]}
    assert summary["last_loss"] == pytest.approx(losses[STEPS][-1])
    assert run.summary["validation/pretrain/best_loss"] == done["losses"]["best_validation"]
    assert run.config["training/pretrain"]["workers"] == 2
    (model,) = {one.name for one in run.artifacts if one.type == "model"}
    assert model == f"pretrain-checkpoint-{run.run_id}"
    kept = sorted(path.name for path in Path(done["checkpoint"]).parent.glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (STEPS - 10, STEPS)]


JOINS = """
from pathlib import Path
import ray
from ray_cluster import report, told, without_service
ray.init()
if {anew}:
    without_service()
from recipes.run_record import RunFile
from recipes.tracking import WandbSettings, tracked
settings = WandbSettings(enabled=True, project="t", entity=None, group=None, mode=None)
file = RunFile(Path({path!r}), resume=True)
with tracked(settings, "s", finish={finish}, announce=print, run_file=file) as run:
    for number in range(20):
        run.log({{"x": number}})
    report([run.info.id, run.info.dir])
    told()
"""


@pytest.mark.ray
def test_killed_driver(cluster: RayCluster, tmp_path: Path) -> None:
    """The driver is killed and its cluster lives: the same command joins the run, and ends it."""
    path = str(tmp_path / "run.json")
    first = cluster.driver(JOINS.format(path=path, anew=True, finish=False))
    run_id, directory = first.next_report()
    psutil.Process(first.pid).kill()
    first.wait()
    second = cluster.driver(JOINS.format(path=path, anew=False, finish=True))
    assert second.next_report() == [run_id, directory]
    second.tell()
    second.succeed()
    (run,) = read_runs(directory).values()
    assert sorted(run.values("s/x")) == sorted([*range(20), *range(20)])
    assert (run.run_id, run.exit_code) == (run_id, 0)
    assert run.steps == list(range(len(run.history)))
