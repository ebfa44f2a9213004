"""Groups on a real Slurm: what a job submits lands in its group, whatever its own job id is."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_stages
import submitit
from ray_cluster import clean_environment
from slurm import PROGRAMS, Slurm, missing_programs
from wandb_file import read_runs


def require_slurm(missing: list[str]) -> None:
    """Skip where this machine has no Slurm; where the tests are the gate, that is an error."""
    if not missing:
        return
    text = f"no {', '.join(missing)} on this machine: apt-get install slurm-wlm munge"
    if os.environ.get("CI"):
        raise RuntimeError(text)
    pytest.skip(text)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    require_slurm(missing_programs())
    with Slurm.start() as started:
        yield started


@pytest.fixture
def home() -> Iterator[Path]:
    """Ray's socket paths have 107 characters at most, so pytest's directories are too deep."""
    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


def test_a_machine_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file is skipped there, naming what to install, and is an error where CI is set."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install slurm-wlm munge"):
        require_slurm(list(PROGRAMS))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(RuntimeError, match="apt-get install slurm-wlm munge"):
        require_slurm(list(PROGRAMS))


@pytest.mark.ray
def test_what_a_job_submits_lands_in_its_group(
    slurm: Slurm, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected children are in the parent's group, in their W&B runs too; bare ones are not."""
    environment = clean_environment(home) | slurm.environment | {"RAY_TMPDIR": str(home / "ray")}
    environment_file = home / "environment"
    needed = ("PATH", "PYTHONPATH", "HOME", "RAY_", "SLURM_CONF")
    lines = [
        f"export {key}={shlex.quote(value)}"
        for key, value in environment.items()
        if key.startswith(needed)
    ]
    # Slurm's own srun would pass nothing of it on.
    environment_file.write_text("\n".join([*lines, "export SLURM_EXPORT_ENV=ALL"]))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    executor = submitit.AutoExecutor(home / "logs", cluster="slurm")
    executor.update_parameters(timeout_min=5, slurm_setup=[f"source {environment_file}"])
    parent = executor.submit(slurm_stages.orchestrate, home / "logs", environment_file)
    answers = slurm_stages.result_of(parent)

    group = f"slurm-{parent.job_id}"
    ids = {name: answer.job_id for name, answer in answers.items()}
    assert ids["orchestrator"] == parent.job_id
    assert len(set(ids.values())) == 6, "each was meant to be a job of its own"
    assert {name: answer[1:] for name, answer in answers.items()} == {
        "orchestrator": (group, "SLURM_JOB_ID"),
        "classify": (group, "WANDB_GROUP"),
        "taxonomy": (group, "WANDB_GROUP"),
        "injected": (group, "WANDB_GROUP"),
        "inheriting": (group, "WANDB_GROUP"),
        "bare": (f"slurm-{ids['bare']}", "SLURM_JOB_ID"),
    }
    runs = read_runs(home / "raywb" / "slurm").values()
    assert sorted((run.job_type, run.group) for run in runs) == [
        ("classify", group),
        ("orchestrator", group),
        ("taxonomy", group),
    ]
    assert [run.values("classify/accuracy") for run in runs if run.job_type == "classify"] == [
        [0.95]
    ]
    printed = parent.stdout().splitlines()
    said = [json.loads(line) for line in printed if line.startswith('{"debug"')]
    assert [line["group"] for line in said] == [group]
    assert f"[orchestrator] Setting WANDB_GROUP={group} for child stages" in parent.stderr()
