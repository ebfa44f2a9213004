"""What the Slurm jobs of test_slurm.py run: an orchestrator and its stages, through submitit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import submitit
from ray_cluster import until

__all__ = ["Answer", "orchestrate", "resolve", "result_of"]


class Answer(NamedTuple):
    """A job's own id, and the group that it found itself in."""

    job_id: str
    group: str | None
    source: str | None = None


def resolve() -> Answer:
    """What a job's start() would take for the group, as far as the environment decides."""
    from raywb.groups import resolve_group

    found = resolve_group(None, None, os.environ)
    return Answer(os.environ["SLURM_JOB_ID"], found.name, found.source)


def run_stage(stage: str) -> Answer:
    """A stage: a Ray cluster and a W&B run of its own."""
    import ray

    import raywb

    ray.init(address="local", num_cpus=1, include_dashboard=False)
    run = raywb.start(project="slurm", job_type=stage)
    with raywb.attach(stage) as client:
        client.log({"accuracy": 0.95})
    raywb.finish()
    return Answer(os.environ["SLURM_JOB_ID"], run.group, run.group_source)


def orchestrate(folder: Path, environment_file: Path) -> dict[str, Answer]:
    """Open a run, submit stages with and without injection, and wait for what they say."""
    import ray

    import raywb

    ray.init(address="local", num_cpus=1, include_dashboard=False)
    run = raywb.start(project="slurm")

    def executor(*, inherits: bool) -> Any:
        made = submitit.AutoExecutor(folder, cluster="slurm")
        # Without inheritance a job's environment is what its setup makes it, as on clusters
        # whose nodes are not like the one that submits.
        made.update_parameters(
            timeout_min=5,
            slurm_setup=[f"source {environment_file}", "export HYDRA_FULL_ERROR=1", "true"],
            slurm_additional_parameters={} if inherits else {"export": "NIL"},
        )
        return made

    bare, inheriting, injected = (executor(inherits=inherits) for inherits in (False, True, False))
    raywb.inject_group(injected)
    jobs = {
        "classify": injected.submit(run_stage, "classify"),
        "taxonomy": injected.submit(run_stage, "taxonomy"),
        "injected": injected.submit(resolve),
        "bare": bare.submit(resolve),
        "inheriting": inheriting.submit(resolve),
    }
    answers = {name: result_of(job) for name, job in jobs.items()}
    raywb.finish()
    mine = Answer(os.environ["SLURM_JOB_ID"], run.group, run.group_source)
    return {"orchestrator": mine, **answers}


def result_of(job: Any) -> Any:
    """What a job returned; submitit itself asks for states that only Slurm's database knows."""
    try:
        until(f"job {job.job_id}", job.paths.result_pickle.exists)
    except TimeoutError as error:
        raise AssertionError(f"{error}: {job.stdout()}\n{job.stderr()}") from error
    return job.result()
