"""Ray Train's and Ray Tune's callbacks on the real libraries, read back from W&B's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray_cluster import RayCluster
from wandb_file import WandbRun, read_runs

pytestmark = pytest.mark.ray
pytest.importorskip("tensorboardX", reason="ray[train] is not installed")

#: What the drivers share: a run whose files lie in their own directory.
HEAD = """
    import json, os, sys, time
    import ray
    import raywb
    from ray_cluster import report, told
    raywb.start(project="trains", mode="offline", run_id=RUN_ID, node_metrics_interval_s=0)
    where = os.path.abspath("storage")
"""


def run_driver(cluster: RayCluster, run_id: str, script: str) -> tuple[Any, dict[str, WandbRun]]:
    """Run a script to its end; returns its report, and the runs that it wrote."""
    head = HEAD.replace("RUN_ID", repr(run_id))
    # The controller asks its workers for reports every two seconds otherwise.
    said = cluster.run_driver(head + script, {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"})
    return said, read_runs(cluster.home / "raywb")


def test_a_training_with_two_workers(cluster: RayCluster) -> None:
    """One line in the user's code: each report is one row over both ranks, with its checkpoint.

    What a worker raises in the end is in the summary and an alert, and Ray's error is the user's
    as ever.
    """
    said, runs = run_driver(
        cluster,
        "train001",
        """
    import tempfile
    from ray.train import Checkpoint, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from raywb.ray_train import RaywbCallback

    def loop(config):
        rank = ray.train.get_context().get_world_rank()
        for epoch in range(3):
            metrics = {"loss": config["lr"] * (rank + 1) / (epoch + 1), "tokens": 10 + rank,
                       "epoch": epoch, "odd": [1, 2], "phase": f"of_{rank}"}
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = None
                if epoch == 1 and rank == 0:
                    with open(os.path.join(folder, "weights"), "w") as file:
                        file.write("all of them")
                    checkpoint = Checkpoint.from_directory(folder)
                ray.train.report(metrics, checkpoint=checkpoint)
        for number in range(2):
            ray.train.report({"valid/accuracy": number + rank, "step": 100 + number})
        ray.train.report({"last": rank})
        if rank == 1:
            raise ValueError("the loss is not a number")

    trainer = DataParallelTrainer(
        loop,
        train_loop_config={"lr": 0.5},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=where, name="mine", callbacks=[
            RaywbCallback(stage="training/pretrain", across_ranks={"tokens": "sum"},
                          checkpoints=True, log_config=True)]),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        text = str(error)
    done = raywb.finish(exit_code=1)
    report([text, done.complete, len(done.unconfirmed), done.rejected])
""",
    )
    assert "the loss is not a number" in said[0]
    assert said[1:] == [True, 0, 6]  # refused: `odd`, of two ranks in three reports
    run = runs["train001"]
    prefix = "training/pretrain/"
    rows = [
        {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
        for row in run.logged
    ]
    rows = [row for row in rows if row]
    epochs = [
        {"loss": 0.75 / (n + 1), "tokens": 21, "epoch": n, "phase": "of_0", "ranks": 2, "step": n}
        for n in range(3)
    ]
    valid = [{"valid/accuracy": n + 0.5, "ranks": 2, "step": 100 + n} for n in range(2)]
    assert rows == [*epochs, *valid, {"last": 0.5, "ranks": 2, "step": 6}]
    assert run.metrics[prefix + "*"].step_metric == prefix + "step"
    assert run.config["training/pretrain"] == {"lr": 0.5}
    (artifact,) = [one for one in run.artifacts if one.type == "model"]
    assert (artifact.name, artifact.paths) == ("checkpoint_training_pretrain", ("weights",))
    summary = {key.removeprefix(prefix): value for key, value in run.summary.items()}
    assert "mine" in summary["checkpoint"]
    assert (summary["error_type"], summary["error_rank"], summary["failures"]) == (
        "ValueError",
        1,
        1,
    )
    assert summary["error_message"] == "the loss is not a number"
    assert [title for title, _ in run.alerts] == ["training/pretrain: ValueError in rank 1"]
    assert run.exit_code == 1


def test_trials_are_runs_in_the_group(cluster: RayCluster) -> None:
    """Each trial is a run with its name, config, results and end, in the cluster's group.

    Or they are stages of the cluster's run: here both at once.
    """
    said, runs = run_driver(
        cluster,
        "tune0001",
        """
    import tempfile
    from ray import tune
    from raywb.ray_tune import RaywbCallback

    def objective(config):
        for number in range(3):
            with tempfile.TemporaryDirectory() as folder:
                with open(os.path.join(folder, "weights"), "w") as file:
                    file.write(str(config["lr"]))
                tune.report({"score": config["lr"] * number},
                            checkpoint=tune.Checkpoint.from_directory(folder))
            if config["lr"] == 2 and number == 1:
                raise RuntimeError("diverged")

    tuner = tune.Tuner(
        objective,
        param_space={"lr": tune.grid_search([1, 2])},
        run_config=tune.RunConfig(storage_path=where, name="search", verbose=0, callbacks=[
            RaywbCallback(checkpoints=True), RaywbCallback("search", own_runs=False)]),
    )
    results = tuner.fit()
    done = raywb.finish()
    report([len(results.errors), done.complete, done.run.group,
            [[one.run.name, one.state] for one in done.stage_runs]])
""",
    )
    errors, complete, group, ended = said
    assert (errors, complete) == (1, True)
    trials = {run.config["lr"]: run for run in runs.values() if run.job_type == "tune"}
    assert sorted(trials) == [1, 2]
    good, bad = trials[1], trials[2]
    assert good.values("score") == [0, 1, 2]
    assert good.values("training_iteration") == good.values("step") == [1, 2, 3]
    assert good.metrics["score"].step_metric == "step"
    assert good.name == f"objective_{good.run_id}"
    assert good.config["trial_id"] == good.run_id
    assert {run.config["compute.cpu_count"] for run in trials.values()} == {1}
    assert {run.config["compute.gpu_count"] for run in trials.values()} == {0}
    assert not {"system", "compute.memory_gb"} & set(good.config)  # those of the driver
    assert {run.group for run in trials.values()} == {group}
    assert sorted(ended) == sorted([[good.name, "finished"], [bad.name, "failed"]])
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert bad.values("score") == [0, 2]
    assert "RuntimeError: diverged" in bad.summary["error_message"]
    assert "in objective" in bad.summary["error_traceback"]
    assert bad.alerts[0][0] == f"trial {bad.name} failed"
    assert {one.name for one in good.artifacts if one.type == "model"} == {
        f"checkpoint_{good.name}"
    }
    run = runs["tune0001"]
    for lr, trial in trials.items():
        prefix = f"search/{trial.run_id}/"
        assert run.values(prefix + "score") == trial.values("score")
        assert run.metrics[prefix + "*"].step_metric == prefix + "step"
        config = run.config[f"search/{trial.run_id}"]
        assert (config["lr"], config["trial_id"]) == (lr, trial.run_id)


def test_without_a_service_training_goes_on(tmp_path: Path) -> None:
    """A callback that cannot attach says so, and raises nothing."""
    from ray_cluster import driver_alone

    script = """
        import logging, time
        from ray_cluster import report
        import raywb
        from raywb.ray_train import RaywbCallback
        import pickle
        callback = RaywbCallback("t", checkpoints="weights")
        attempts = []
        def refuse():
            attempts.append(1)
            raise raywb.RaywbError("no service")
        callback._late._attach = refuse
        for number in range(3):
            callback.after_report(None, [{"loss": 1.0}], None)
        callback.after_exception(None, {0: ValueError("x")})
        callback.after_report(None, None, None)
        copy = pickle.loads(pickle.dumps(callback))
        report([len(attempts), callback._late._attempts.missed, copy.checkpoints, copy._reports])
    """
    with driver_alone(script) as driver:
        assert driver.succeed() == [1, 4, "weights", 0]
        assert "another try in 5 s" in driver.output
