"""The five stages of SPEC C: an orchestrator, and stages with runs of their own, on a real Ray."""

from __future__ import annotations

import pytest
from ray_cluster import RayCluster
from wandb_file import read_runs

pytestmark = pytest.mark.ray

STAGES = ("classify", "taxonomy", "decompose", "topic", "verification")

#: The orchestrator: starts the stages one after the other, each in a Ray task of its own.
ORCHESTRATOR = """
    import os
    import pandas, ray, raywb
    from msgspec import to_builtins
    from ray_cluster import report, told, until, without_service

    STAGES = told()
    cfg = {
        "wandb": {"enabled": True, "project": "topics", "mode": "offline"},
        "model": {"model_source": "small", "engine_kwargs": {"dtype": "bfloat16", "seed": 1}},
        "runtime": {"debug": True, "use_llm_topic": False},
    }

    @ray.remote(num_cpus=0, max_retries=0)
    def stage(name):
        with raywb.WandbLogger(cfg, stage=name, run_id=f"{name}-001") as logger:
            for step in range(20):
                logger.log_metrics({"accuracy": step / 20}, step=step)
            logger.log_table(pandas.DataFrame({"label": ["a", "b"], "n": [1, 2]}), "labels")
            logger.set_config({"threshold": 0.5})
            if name == "decompose":
                raise ValueError("as the test asked")
            if name == "verification":
                os._exit(1)  # as the kernel ends a process
            return logger.wb_config._asdict()

    @ray.remote(num_cpus=0)
    def disabled():
        with raywb.WandbLogger({"wandb": {"enabled": False}}, stage="off") as logger:
            logger.log_metrics({"x": 1})
            logger.log_table([{"a": 1}], "t")
            logger.set_config({"a": 1})
            return logger.wb_config

    ray.init()
    without_service()
    run = raywb.start(cfg=cfg)
    configs, failures = [], []
    for name in STAGES:
        try:
            configs.append(ray.get(stage.remote(name)))
        except Exception as error:
            failures.append(name)
    raywb.attach().log({"stages": len(configs)})
    states = lambda: {one.run.job_type: one.state for one in raywb.status().stage_runs}
    ended = lambda: [name for name, state in states().items() if state != "running"]
    # What the killed one left is brought home by a sweep of the service's own.
    until("all stages to be ended", lambda: len(ended()) == len(STAGES) or raywb.finish())
    finish = raywb.finish()
    report([run.group, configs, failures, ray.get(disabled.remote()), to_builtins(finish)])
"""


def test_stages_have_runs_in_the_orchestrators_group(cluster: RayCluster) -> None:
    """One group, six runs, each with its job type, its metadata, its state, and all its rows."""
    driver = cluster.driver(ORCHESTRATOR)
    driver.tell(STAGES)
    group, configs, failures, disabled, finish = driver.next_report()
    driver.succeed()
    assert failures == ["decompose", "verification"]
    assert disabled is None
    assert [(one["group"], one["project"], one["mode"]) for one in configs] == [
        (group, "topics", "offline")
    ] * 3
    assert finish["complete"], finish
    runs = read_runs(finish["run"]["dir"])
    assert len(runs) == 6
    assert {run.group for run in runs.values()} == {group}
    orchestrator = runs.pop(finish["run"]["id"])
    assert orchestrator.job_type == "orchestrator"
    states = {one["run"]["job_type"]: one["state"] for one in finish["stage_runs"]}
    assert states == {
        "classify": "finished",
        "taxonomy": "finished",
        "decompose": "failed",
        "topic": "finished",
        "verification": "crashed",
    }
    for name in STAGES:
        run = runs[f"{name}-001"]
        assert run.job_type == name
        assert run.name.startswith(f"topics-{name}-20")
        assert run.values("accuracy") == [step / 20 for step in range(20)]
        assert run.values("step") == list(range(20))
        assert [artifact.name for artifact in run.artifacts] == [f"run-{name}-001-labels"]
        assert run.config["threshold"] == 0.5
        for config in (run.config, orchestrator.config):
            assert config["compute.cpu_count"] >= 1
            assert config["system"]["python_version"]
            assert config["model"] == {
                "model_source": "small",
                "engine_kwargs": {"dtype": "bfloat16"},
            }
            assert config["runtime"] == {"debug": True, "use_llm_topic": False}
    text = driver.output
    assert "[raywb] ✓ Logged compute metadata: " in text
    assert f"[orchestrator] Setting WANDB_GROUP={group} for child stages" in text
    assert "[raywb] Starting run: topics-classify-20" in text


def test_a_run_that_nobody_started_says_where_it_ran(cluster: RayCluster) -> None:
    """The process whose attach() made the service brings what its job was given."""
    report = cluster.run_driver("""
        import ray, raywb
        from msgspec import to_builtins
        from ray_cluster import report, without_service
        ray.init()
        without_service()
        raywb.attach("s").log({"x": 1})
        report(to_builtins(raywb.finish()))
    """)
    run = read_runs(report["run"]["dir"])[report["run"]["id"]]
    assert run.values("s/x") == [1]
    assert run.config["compute.cpu_count"] >= 1


def test_a_logger_may_be_entered_again(cluster: RayCluster) -> None:
    """The second block goes on in the run of its id, after the first has ended it."""
    report = cluster.run_driver("""
        import ray, raywb
        from msgspec import to_builtins
        from ray_cluster import report, without_service
        ray.init()
        without_service()
        raywb.start(project="again")
        logger = raywb.WandbLogger(stage="s", run_id="again-1")
        for number in range(2):
            with logger:
                logger.log_metrics({"x": number})
        report(to_builtins(raywb.finish()))
    """)
    assert (report["complete"], report["lost"]) == (True, {})
    assert read_runs(report["run"]["dir"])["again-1"].values("x") == [0, 1]
