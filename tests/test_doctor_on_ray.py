"""`raywb doctor` on real clusters: one that lacks what it needs, and one that has it all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from ray_cluster import RayCluster
from wandb_client import API_KEY
from wandb_server import WandbServer

from raywb import __version__
from raywb.doctor.findings import Diagnosis, Finding
from raywb.doctor.ray_environment import VARIABLES

pytestmark = pytest.mark.ray

GOOD = {one.name: one.value for one in VARIABLES}
LIMIT = "RAY_MAX_LIMIT_FROM_API_SERVER"


def diagnose(
    cluster: RayCluster, directory: Path, environment: Mapping[str, str] | None = None
) -> tuple[Diagnosis, int]:
    """The command as a person runs it next to the cluster, in a directory of his own."""
    directory.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "raywb", "doctor", "--json"],
        env={**cluster.environment, **(environment or {})},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout, done.stderr
    assert API_KEY not in done.stdout + done.stderr
    return msgspec.json.decode(done.stdout, type=Diagnosis), done.returncode


def findings(diagnosis: Diagnosis, check: str) -> list[Finding]:
    return [finding for finding in diagnosis.findings if finding.check == check]


def states(diagnosis: Diagnosis) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in diagnosis.findings:
        found.setdefault(finding.check, set()).add(finding.state)
    return found


@pytest.fixture(scope="module")
def lacking() -> Iterator[RayCluster]:
    """Two CPUs on a head without variables, and a node that has them, but hardly any package.

    What a user's own directory has in the place of tqdm and raywb stands for an environment
    without them.
    """
    with RayCluster.start(num_cpus=2) as cluster:
        other = cluster.root / "other"
        other.mkdir()
        for name in ("tqdm", "raywb"):
            lack = f"raise ModuleNotFoundError(\"No module named '{name}'\")\n"
            (other / f"{name}.py").write_text(lack)
        cluster.add_node(0, environment={**GOOD, "PYTHONPATH": str(other)})
        yield cluster


@pytest.fixture(scope="module")
def lacking_said(lacking: RayCluster) -> tuple[Diagnosis, int]:
    return diagnose(lacking, lacking.root / "elsewhere", {"WANDB_MODE": "offline"})


def test_variables_that_ray_was_started_without(lacking_said: tuple[Diagnosis, int]) -> None:
    """They are read from Ray's own processes, and named with these, the node and the place."""
    diagnosis, code = lacking_said
    assert code == 7
    environment = findings(diagnosis, "environment")
    assert [finding.found.split()[0] for finding in environment] == list(GOOD)
    (limit,) = (finding for finding in environment if finding.found.startswith(LIMIT))
    assert limit.state == "trouble"
    assert "is not set for Ray's dashboard, gcs_server and raylet on 1 of 2 nodes (" in limit.found
    assert "Given limit 40000 exceeds the supported limit 10000" in (limit.remedy or "")
    assert f"--env={LIMIT}=40000" in (limit.remedy or "")
    assert environment[-1].state == "warning", "there are no GPUs"


def test_a_node_that_cannot_import(lacking_said: tuple[Diagnosis, int]) -> None:
    """It is asked all the same: what the doctor sends needs nothing of raywb there."""
    imports = {
        finding.found: finding.remedy or "" for finding in findings(lacking_said[0], "imports")
    }
    (raywb,) = (found for found in imports if found.startswith("`import raywb`"))
    assert "fails on 1 of 2 nodes (" in raywb
    assert "No module named 'raywb'" in raywb
    (xenna,) = (found for found in imports if found.startswith("`import cosmos_xenna"))
    assert "No module named 'tqdm'" in xenna
    assert "pip install tqdm" in imports[xenna]
    assert len(imports) == 2, "wandb can be imported"


def test_the_rest_of_a_small_cluster(lacking_said: tuple[Diagnosis, int]) -> None:
    """CPUs, versions, disks, clocks and the service that is not there."""
    found = states(lacking_said[0])
    assert found["Ray cluster"] == {"well"}
    assert found["CPUs"] == {"trouble"}
    assert "none on 1 of 2 nodes" in findings(lacking_said[0], "CPUs")[0].found
    assert found["versions"] == found["clocks"] == found["W&B key"] == {"well"}
    assert "trouble" not in found["disk"]
    assert "2 nodes" in findings(lacking_said[0], "clocks")[0].found
    (state_api,) = findings(lacking_said[0], "state API")
    assert "--include-dashboard=true" in (state_api.remedy or "")
    (service,) = findings(lacking_said[0], "service")
    assert service.state == "warning"
    assert "raywb.start(" in (service.remedy or "")
    assert "nodes" not in found, "every node answered, and every part of it could be looked at"


def test_a_driver_that_authenticates_in_another_way(lacking: RayCluster, tmp_path: Path) -> None:
    """Token authentication on one side only is said to be that."""
    diagnosis, code = diagnose(
        lacking, tmp_path, {"RAY_AUTH_MODE": "token", "WANDB_MODE": "offline"}
    )
    (finding,) = findings(diagnosis, "Ray cluster")
    assert (code, finding.state) == (7, "trouble")
    assert "RAY_AUTH_MODE is token here" in finding.found


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer(entity="robots", api_key=API_KEY) as server:
        yield server


@pytest.fixture(scope="module")
def whole(server: WandbServer) -> Iterator[RayCluster]:
    """A cluster that has all it needs, the key on its head, and a run with a row."""
    environment = {
        **GOOD,
        "WANDB_API_KEY": API_KEY,
        "WANDB_BASE_URL": server.url,
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
    }
    with RayCluster.start(num_cpus=8, dashboard=True, environment=environment) as cluster:
        cluster.run_driver(
            """
            import raywb
            raywb.start(project="sky")
            with raywb.attach("training/x") as client:
                client.log({"loss": 1.0}, step=1)
                client.flush(30.0)
            """
        )
        server.wait_until(lambda: any(run.history for run in server.runs.values()), 60.0)
        yield cluster


def test_a_cluster_that_is_well(whole: RayCluster, server: WandbServer) -> None:
    """Every check says so, the exit code is 0, and the head has asked W&B's server itself."""
    diagnosis, code = diagnose(whole, whole.root / "elsewhere")
    assert code == 0, diagnosis
    found = states(diagnosis)
    disk = found.pop("disk")
    assert "trouble" not in disk, "a full machine is a warning"
    assert found == {check: {"well"} for check in found}, diagnosis
    assert set(found) == {
        *("Ray cluster", "environment", "CPUs", "versions", "imports", "clocks"),
        *("W&B key", "W&B server", "service", "delivery", "who logs", "losses", "charts"),
    }
    assert f"raywb {__version__}" in findings(diagnosis, "versions")[0].found
    assert findings(diagnosis, "W&B key")[0].found == "found on the head node in WANDB_API_KEY"
    assert "robots" in findings(diagnosis, "W&B server")[0].found
    assert "sky" in findings(diagnosis, "charts")[0].found
    assert "raywb charts" in (findings(diagnosis, "charts")[0].remedy or "")
    assert server.requests["graphql:RaywbDoctorRun"] == 1
    assert server.errors == []


def test_charts_of_the_clusters_run(whole: RayCluster, server: WandbServer, tmp_path: Path) -> None:
    """`raywb charts` on the cluster goes to the run's project and charts its stages."""
    done = subprocess.run(
        [sys.executable, "-m", "raywb", "charts"],
        env=whole.environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (view,) = server.store.views
    assert (view.entity, view.project) == ("robots", "sky")
    assert "training/x/loss" in view.spec
    assert "training/pretrain" not in view.spec
