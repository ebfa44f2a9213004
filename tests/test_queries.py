"""The README's queries, as they stand there, find the runs that raywb wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from local_service import CLUSTER, LocalService
from online_service import KEY, set_environment
from wandb_client import run_client
from wandb_server import WandbServer

from raywb.client import Client
from raywb.connection import Connection
from raywb.groups import Group
from raywb.nodes.compute import job_metadata
from raywb.reports import StageRunRequest
from raywb.settings import Settings

README = Path(__file__).parents[1] / "README.md"


def queries() -> list[str]:
    """The lines that ask W&B for runs."""
    found = re.findall(r"^(api\.runs\(.*\))", README.read_text(), re.MULTILINE)
    assert len(found) == 3
    return found


def test_the_queries_of_the_readme(
    service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of a group, runs of one stage, and runs by the number of their GPUs."""
    set_environment(monkeypatch, tmp_path)
    with WandbServer() as server:
        service.up()
        assert service.service is not None
        wanted = {"mode": "online", "base_url": server.url, "project": "sky", "entity": "robots"}
        settings = Settings(**wanted, run_id="all")
        service.service.start(settings, wanted, Group("slurm-12345", "SLURM_JOB_ID"), KEY)
        for gpus in (0, 2, 4, 8):
            stage = f"classify-{gpus}" if gpus else "classify"
            explicit = {"group": "another"} if gpus == 8 else {}
            request = StageRunRequest(
                stage="classify", run_id=stage, explicit=explicit, nonce=stage
            )
            run, session = service.service.open_stage_run(request, None)
            connection = Connection(CLUSTER, service.endpoint, 1)
            service._connections.append(connection)
            channel = connection.open_channel("classify", None, None, own_run=(run.epoch, session))
            client = Client(connection, channel, "classify", run)
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
            client.config.update(job_metadata(None, visible))
            client.log({"x": gpus})
            client.close()
        report = service.service.finish(60.0, 0)
        assert report.complete, report
        script = f"""
            import json
            import wandb
            api = wandb.Api()
            asked = [{", ".join(queries())}]
            print(json.dumps([sorted(run.id for run in runs) for runs in asked]))
        """
        done = run_client(script, tmp_path, server.url)
    assert json.loads(done.stdout) == [
        ["all", "classify", "classify-2", "classify-4"],
        ["classify", "classify-2", "classify-4"],
        ["classify-4", "classify-8"],
    ], done.stderr
