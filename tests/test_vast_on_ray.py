"""A launch from its key to the end of its machine, with a real Ray and a real recipe in it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from click.testing import CliRunner
from git_remote import git_remote
from moto.server import ThreadedMotoServer
from vast_sandbox import Sandbox, sandbox
from vast_server import VastServer
from wandb_client import API_KEY
from wandb_server import WandbServer

from raywb.cli import main
from raywb.launch.vast.job import STOPPED_AT_LIMIT, Job, Look

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


def test_a_machine_prepares_data_reports_and_is_gone(
    vast: VastServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its container is stopped in the middle, then its script is killed, each started again.

    The second start goes on with the same command, the third one follows the job that is there.
    The instance is destroyed, with its own key,
    when W&B's server has every row and the outputs are at their place, and not before.
    """
    with (
        bucket(monkeypatch) as kept,
        git_remote(tmp_path / "git") as remote,
        WandbServer(api_key=API_KEY) as wandb,
    ):
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
                *("--wandb-key-file", str(tmp_path / "wandb_key"), "--upload-to", "s3://kept/run"),
                *("--extras", "train,vast,s3", "--env", "AWS_ENDPOINT_URL"),
                *("--env", "AWS_ACCESS_KEY_ID", "--env", "AWS_SECRET_ACCESS_KEY"),
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
            manifest = json.load(kept.get_object(Bucket="kept", Key="run/manifest.json")["Body"])
            assert manifest == json.loads((source / "data/run/manifest.json").read_text())
            (run,) = [one for one in wandb.runs.values() if one.state == "finished"]
            assert run.project == "robots"
            assert run.values("xenna/progress")[-1] == 100.0
            # Its Ray still lives, and says of other jobs how they ended.
            check_exit_codes(box)


@contextlib.contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """S3 on loopback with a bucket called kept, as this process's environment has it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="kept")
        yield client
    finally:
        server.stop()


def check_exit_codes(box: Sandbox) -> None:
    """The job's own code where it failed, not 0 for a stopped one, and 124 at a time limit."""
    dashboard = f"http://127.0.0.1:{box.environment['RAYWB_DASHBOARD_PORT']}"
    gcs_port = int(box.environment["RAYWB_RAY_PORT"])

    def job(name: str) -> Job:
        return Job(dashboard, gcs_port, name, box.root / name)

    job("failed").submit(box.root, ["bash", "-c", "exit 7"])
    assert job("failed").wait(until_s=None, say=print) == 7
    assert (box.root / "failed").read_text() == "7\n"
    job("endless").submit(box.root, ["sleep", "600"])
    job("endless").submit(box.root, ["sleep", "600"])  # as after an answer that was lost
    assert job("endless").look().look is Look.RUNNING
    assert job("endless").wait(until_s=time.time() + 0.5, say=print) == STOPPED_AT_LIMIT
    seen = job("endless").look()
    assert seen.look is Look.ENDED
    assert seen.code > 0
    assert job("unheard-of").look().look is Look.UNKNOWN
