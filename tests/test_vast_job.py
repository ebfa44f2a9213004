"""The watcher of a job: what a sick dashboard says, or does not say, ends no run that is alive."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from ray_dashboard import RayDashboard

from raywb.errors import LaunchError
from raywb.launch.vast import job as job_module
from raywb.launch.vast import ready
from raywb.launch.vast.job import STOPPED_AT_LIMIT, Job, Look


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayDashboard]:
    monkeypatch.setattr(job_module, "REQUEST_TIMEOUT_S", (0.2, 0.2))
    with RayDashboard() as dashboard:
        yield dashboard


@pytest.fixture
def gcs() -> Iterator[socket.socket]:
    """What takes connections as Ray's own server does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture
def job(dashboard: RayDashboard, gcs: socket.socket, tmp_path: Path) -> Job:
    return Job(dashboard.url, gcs.getsockname()[1], "job-1", tmp_path / "ended-1")


def ending(job: Job, said: list[str], until_s: float | None = None) -> int | None:
    """Wait for the end as the script does, without long pauses."""
    return job.wait(until_s=until_s, say=said.append, pause_s=0.02)


@pytest.mark.parametrize("fault", [500, 503, 404, "hang", "reset", "nonsense"])
def test_a_sick_dashboard_ends_no_job(job: Job, dashboard: RayDashboard, fault: int | str) -> None:
    """Looks that fail are said, once, and repeated; the code is the one that comes at last."""
    dashboard.faults += [fault, fault]
    dashboard.job = {"status": "FAILED", "driver_exit_code": 7}
    said: list[str] = []
    assert ending(job, said) == 7
    assert len(said) == 1
    assert "waiting, the job may well run" in said[0]
    assert len(dashboard.requests) == 3


@pytest.mark.parametrize(
    ("status", "code", "means"),
    [("SUCCEEDED", 0, 0), ("FAILED", -9, 137), ("STOPPED", None, 1), ("FAILED", None, 1)],
)
def test_an_end_has_the_code_that_shells_count(
    job: Job, dashboard: RayDashboard, status: str, code: int | None, means: int
) -> None:
    """A signal counts from 128, and a job that was stopped is no success."""
    dashboard.job = {"status": status, "driver_exit_code": code}
    assert ending(job, []) == means


def test_where_the_dashboard_is_dead_the_command_says_how_it_ended(
    job: Job, dashboard: RayDashboard
) -> None:
    """Ray lives, so the job may; the file that its command leaves is believed."""
    dashboard.close()
    assert job.look().look is Look.UNCLEAR
    job.record.write_text("5\n")
    assert ending(job, []) == 5


def test_a_job_is_lost_with_ray_itself(
    job: Job, dashboard: RayDashboard, gcs: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where nothing listens for a while, or Ray says again and again that it has none."""
    monkeypatch.setattr(job_module, "LOST_AFTER_S", 0.3)
    said: list[str] = []
    dashboard.job = None
    assert ending(job, said) == 1
    assert len(dashboard.requests) == job_module.UNKNOWN_LOOKS
    gcs.close()
    dashboard.up = lambda: False
    begun_s = time.monotonic()
    assert ending(job, said) == 1
    assert time.monotonic() - begun_s >= 0.3
    assert "Ray was lost" in said[-1]


def test_a_job_at_its_limit_is_stopped_and_has_failed(job: Job, dashboard: RayDashboard) -> None:
    """--max-hours: Ray is told to stop it, and the code is that of `timeout`."""
    dashboard.job = {"status": "RUNNING"}
    said: list[str] = []
    assert ending(job, said, until_s=time.time() + 0.1) == STOPPED_AT_LIMIT
    assert "POST /api/jobs/job-1/stop" in dashboard.requests
    assert job.look().look is Look.ENDED


def test_what_is_submitted_leaves_its_code(job: Job, dashboard: RayDashboard) -> None:
    """The command that Ray gets runs in its directory, with its arguments, and its code stays."""
    script = "import os, sys; print(os.getcwd()); sys.exit(len(sys.argv[1]))"
    job.submit(job.record.parent, [sys.executable, "-c", script, "it's $HOME"])
    assert dashboard.job == {"status": "FAILED", "driver_exit_code": 10}
    assert job.record.read_text() == "10\n"


def test_a_submission_that_was_heard_is_one(job: Job, dashboard: RayDashboard) -> None:
    """An answer that is lost is no second job; one that Ray did not take is an error."""
    dashboard.faults += [500]
    with pytest.raises(LaunchError, match=r"did not take the job: 500"):
        job.submit(job.record.parent, ["true"])
    dashboard.job = {"status": "RUNNING"}
    dashboard.faults += ["hang"]
    job.submit(job.record.parent, ["true"])
    assert [one for one in dashboard.requests if one.startswith("POST")] == [
        "POST /api/jobs/",
        "POST /api/jobs/",
    ]


def test_the_end_is_tried_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments that this version does not take, stores without a client, no client of Vast's."""
    if not os.environ.get("CI"):
        pytest.importorskip("vastai", reason="vastai is not installed")
    words = ["--place", "vast", "--outputs", "data", "--upload-to"]
    with pytest.raises(ValueError, match="s9"):
        ready.main([*words, "s9://a/b"])
    with pytest.raises(click.UsageError, match="--sideways"):
        ready.main([*words, "file:///a", "--sideways"])
    ready.main([*words, "file:///a"])
    monkeypatch.setitem(sys.modules, "vastai", None)
    with pytest.raises(ImportError, match="vastai"):
        ready.main([*words, "file:///a"])
