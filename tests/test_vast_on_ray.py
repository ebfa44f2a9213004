"""A launch from its key to the end of its machine, with a real Ray and a real recipe in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from git_remote import git_remote
from vast_sandbox import sandbox
from vast_server import VastServer
from wandb_client import API_KEY
from wandb_server import WandbServer

from raywb.cli import main
from raywb.launch.vast import job

if not os.environ.get("CI"):
    pytest.importorskip("vastai", reason="vastai is not installed")

pytestmark = [pytest.mark.ray, pytest.mark.xenna, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[1]

CONFIG = """
output_dir: data/run
input: {paths: [texts], shard_bytes: 2_500, max_document_bytes: 2_000}
tokenizer: {vocab_size: 400, sample_bytes: 20_000}
workers: {tokenize: 1}
train: {enabled: false}
observability: {pipeline_logging_interval_s: 1}
wandb: {project: robots}
"""


@pytest.fixture
def vast() -> Iterator[VastServer]:
    with VastServer() as server:
        yield server
        assert server.unexpected == []


def test_a_machine_prepares_data_reports_and_is_gone(
    vast: VastServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its container is stopped in the middle, then its script is killed, each started again.

    The second start goes on with the same command, the third one follows the job that is there.
    The instance is destroyed, with its own key,
    when W&B's server has every row and the outputs are at their place, and not before.
    """
    kept = tmp_path / "kept"
    with git_remote(tmp_path / "git") as remote, WandbServer(api_key=API_KEY) as wandb:
        for name in ("raywb", "recipes", "pyproject.toml"):
            remote.copy(ROOT / name)
        for n in range(6):
            rows = [json.dumps({"text": f"Row {k} of {n}: " + "words " * k}) for k in range(12)]
            remote.write(f"texts/{n}.jsonl", "\n".join(rows) + "\n")
        remote.write("small.yaml", CONFIG)
        remote.write(".gitignore", "data/\n")
        commit = remote.commit()
        remote.push()
        monkeypatch.chdir(remote.tree)
        monkeypatch.setenv("VAST_URL", vast.url)
        monkeypatch.setenv("VAST_API_KEY", vast.api_key)
        monkeypatch.setenv("WANDB_BASE_URL", wandb.url)
        (tmp_path / "wandb_key").write_text(API_KEY)
        launched = CliRunner().invoke(
            main,
            [
                *("vast", "launch", "--yes", "--auto-shutdown", "--grace-s", "1"),
                *("--wandb-key-file", str(tmp_path / "wandb_key"), "--upload-to", f"file://{kept}"),
                *("--outputs", "data/run", "recipes.pretrain", "--", "small.yaml"),
            ],
        )
        assert launched.exit_code == 0, launched.output
        instance = vast.instances[int(launched.stdout)]
        with sandbox(vast, instance) as box:
            box.start()
            box.logged("Job 'job-1' submitted successfully")
            box.cut_power()
            assert vast.destroyed == []

            second = box.start()
            box.logged("attempt 1 was interrupted: the same command goes on")
            box.logged("Job 'job-2' submitted successfully")
            second.kill()
            second.wait()
            third = box.start()
            box.logged("attempt 2 is on this Ray: following it")
            for text in ("W&B run robots", "Done in ", "auto-shutdown in 1 second"):
                box.logged(text)
                assert not any(map(box.is_shown, (API_KEY, instance.key, vast.api_key)))
            assert third.wait(60) == 0
            log = box.log
            assert "the job has ended with exit code 0" in log
            assert "attempt 2: -m recipes.pretrain small.yaml" in log
            assert (box.state / "attempt").read_text() == "2\n"
            assert vast.destroyed == [instance.id]
            assert {one.key for one in vast.of_kind("destroy")} == {instance.key}
            for secret in (API_KEY, instance.key, vast.api_key):
                assert secret not in log
            source = box.state / "source"
            assert (source / ".git" / "HEAD").read_text().strip() == commit
            manifest = json.loads((kept / "manifest.json").read_text())
            assert manifest == json.loads((source / "data/run/manifest.json").read_text())
            (run,) = [one for one in wandb.runs.values() if one.state == "finished"]
            assert run.project == "robots"
            assert run.values("xenna/progress")[-1] == 100.0
            # Its Ray still lives, and says of other jobs how they ended.
            port = box.environment["RAYWB_DASHBOARD_PORT"]
            check_exit_codes(f"http://127.0.0.1:{port}", capsys)


def check_exit_codes(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The driver's own code where it failed, as shells count them, and not 0 for a stopped job."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    client.submit_job(entrypoint="exec sleep 600", submission_id="stopped")
    client.submit_job(entrypoint="exit 7", submission_id="failed")
    capsys.readouterr()
    assert job.main([address, "failed", "--wait"]) == 0
    assert capsys.readouterr().out == "7\n"
    assert job.main([address, "stopped"]) == 0
    assert capsys.readouterr().out == ""
    client.stop_job("stopped")
    assert job.main([address, "stopped", "--wait"]) == 0
    assert int(capsys.readouterr().out) > 0
    assert job.main([address, "unheard-of"]) == job.EXIT_UNKNOWN
