"""Jobs on the cluster of cluster.yaml: submitted, given nodes, which go again, and nothing lost.

The head, the nodes' types, their environment and their limits are cluster.yaml's; Ray's autoscaler
is real, the machines are processes of this one (``simulated_nodes``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_cluster import RayCluster, clean_environment
from simulated_nodes import simulate
from wandb_file import WandbRun, read_runs

import raywb
from raywb.settings import Settings
from recipes.local_ray import XENNA_ENVIRONMENT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).parents[1]

#: In place of cluster.yaml's five minutes and raywb's half a minute: a job's processes end with
#: it, without a word; once they are silent, their node is looked through, while it is there.
IDLE_TIMEOUT_S, SILENT_AFTER_S = 9.0, 3.0

FILES = 12

#: What must not be uploaded: an environment, a data set, W&B's files, a history.
JUNK = (".venv/lib/big.so", "data/pretrain/a.bin", "wandb/run-1/run.wandb", ".git/objects/pack")
JUNK_BYTES = 3_000_000

#: The first job's first step: opens the run, with that setting.
OPEN_RUN = f"""
import ray, raywb
ray.init()
raywb.start(project="raywb-pretrain", silent_after_s={SILENT_AFTER_S})
"""

#: The second job: rows from a node of each type, which it has brought.
SECOND_JOB = """
import json, os, ray, raywb

@ray.remote
def log(stage):
    with raywb.attach(stage) as client:
        for i in range(500):
            client.log({"i": i}, step=i)
    return [ray.get_runtime_context().get_node_id(), raywb.__file__, os.environ.get("WANDB_GROUP")]

ray.init()
shapes = {"prep": {"num_cpus": 16}, "training/operator": {"num_cpus": 48, "num_gpus": 4}}
work = [log.options(**shape).remote(stage) for stage, shape in shapes.items()]
print("SECOND", json.dumps([raywb.status().run.id, *ray.get(work)]))
"""

#: Watches the nodes go; asks for what cannot come.
WATCHER = """
import time
import ray, raywb
from msgspec import to_builtins
from ray_cluster import report, until
from recipes.cluster import RaySettings, ray_cluster
from recipes.errors import ClusterError

ray.init()

def gone():
    nodes = raywb.status().nodes
    return all(node.left_s is not None for node in nodes if not node.is_head)

until("the nodes to go", gone)
began = time.monotonic()
try:
    with ray_cluster(RaySettings(num_cpus=10_000, log_to_driver=False)):
        refusal = None
except ClusterError as error:
    refusal = str(error)
report([to_builtins(raywb.status()), refusal, time.monotonic() - began])
"""


@dataclass(frozen=True)
class Story:
    """What became of two jobs on an autoscaled cluster."""

    first: str
    second: str
    seen_by_second: list[Any]
    working_directory: Path
    uploaded: list[str]
    services: set[int]
    status: dict[str, Any]
    refusal: str
    refused_after_s: float
    finished: str
    run: WandbRun
    records: list[dict[str, Any]]


def description() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return loaded


def environment_of_nodes() -> dict[str, str]:
    """What cluster.yaml puts into the environment of every node's container."""
    options = description()["docker"]["run_options"]
    pairs = [one.removeprefix("--env=") for one in options if one.startswith("--env=")]
    return dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with what lies around in one."""
    root = tmp_path_factory.mktemp("checkout") / "raywb"
    root.mkdir()
    for name in ("raywb", "recipes", "tests"):
        shutil.copytree(
            REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for path in REPOSITORY.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, root)
    for name in JUNK:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.urandom(JUNK_BYTES))
    (root / "open_run.py").write_text(OPEN_RUN)
    (root / "second_job.py").write_text(SECOND_JOB)
    return root


@pytest.fixture(scope="module")
def story(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Two jobs, the end of their nodes, and ``raywb finish``."""
    corpus, output = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("out") / "data"
    for number in range(FILES):
        (corpus / f"{number:02d}.txt").write_text(f"File {number} and its words. " * 60)
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    prepare = simulate(
        description(),
        idle_timeout_s=IDLE_TIMEOUT_S,
        environment=environment_of_nodes() | {"PATH": programs},
    )
    with RayCluster.start(
        num_cpus=description()["available_node_types"]["head"]["resources"]["CPU"],
        dashboard=True,
        prepare_head=prepare,
    ) as cluster:
        environment = {
            **clean_environment(cluster.home),
            "RAY_ADDRESS": cluster.dashboard_address,
            "PATH": programs,
        }

        def submit(*words: str) -> str:
            submitting = ["-c", "from ray.scripts.scripts import main; main()", "job", "submit"]
            return command(
                [sys.executable, *submitting, "--working-dir", ".", *words], checkout, environment
            )

        ours = {"PYTHONPATH": clean_environment(cluster.home)["PYTHONPATH"]}
        recipe = shlex.join(
            [
                *("python", "-m", "recipes.pretrain", "tiny", f"output_dir={output}"),
                *(f"input.paths={corpus}", "input.limit_bytes=null", "input.shard_bytes=2000"),
                *("tokenizer.vocab_size=300", "observability.pipeline_logging_interval_s=1"),
                "train.enabled=false",
            ]
        )
        first = submit("--", "bash", "-c", f"python open_run.py && {recipe}")
        services = {process_of(cluster)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_GROUP", "nightly")
            for_jobs = json.dumps(raywb.runtime_env())
        second = submit("--runtime-env-json", for_jobs, "--", "python", "second_job.py")
        status, refusal, refused_after_s = cluster.run_driver(WATCHER, ours)
        services.add(process_of(cluster))
        finished = command(
            [sys.executable, "-m", "raywb", "--address", cluster.address, "finish"],
            cluster.root,
            environment,
        )
        (package,) = (cluster.root / "ray").glob(
            "session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"
        )
        runs = read_runs(status["run"]["dir"])
        said = re.search(r"^SECOND (.*)$", second, re.MULTILINE)
        assert said, second
        yield Story(
            first=first,
            second=second,
            seen_by_second=json.loads(said.group(1)),
            working_directory=package,
            uploaded=sorted(
                str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()
            ),
            services=services,
            status=status,
            refusal=refusal,
            refused_after_s=refused_after_s,
            finished=finished,
            run=runs[status["run"]["id"]],
            records=[
                json.loads(line)
                for line in (output / "pipeline_stats.jsonl").read_text().splitlines()
            ],
        )


def command(words: list[str], directory: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        words, cwd=directory, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def process_of(cluster: RayCluster) -> int:
    service = cluster.service()
    assert service is not None
    return int(service.pid)


def test_a_job_brings_its_nodes_and_its_run_is_told(story: Story) -> None:
    """One command: a node comes, the pipeline runs on it, and the log says where its run is."""
    assert f"({story.status['run']['mode']}) in {story.status['run']['dir']}" in story.first
    assert "Done in" in story.first
    assert "raywb finish" in story.first


def test_the_upload_is_small(story: Story) -> None:
    """No environment, data, history, tests or W&B files go along, and raywb itself does."""
    uploaded_bytes = sum((story.working_directory / path).stat().st_size for path in story.uploaded)
    print(f"{uploaded_bytes:,} bytes unpacked")
    assert uploaded_bytes < JUNK_BYTES
    tops = {path.partition("/")[0] for path in story.uploaded}
    assert tops >= {"raywb", "recipes", "second_job.py", "cluster.yaml"}
    assert not tops & {".venv", "data", "wandb", ".git", "tests"}
    assert "skipping upload" in story.second, "what is there is not sent again"


def test_a_second_job_logs_to_the_same_run(story: Story) -> None:
    """It attaches from nodes that it has brought, with the raywb of its working directory."""
    run_id, *nodes = story.seen_by_second
    assert run_id == story.run.run_id == story.status["run"]["id"]
    for _, module, group in nodes:
        assert f"/{story.working_directory.name}/raywb/" in module
        assert group == "nightly"
    assert story.run.values("prep/i") == list(range(500))
    assert story.run.values("training/operator/i") == list(range(500))
    rows = [
        {key.removeprefix("xenna/"): value for key, value in row.items() if key[0] != "_"}
        for row in story.run.history
        if "xenna/progress" in row
    ]
    assert rows == [
        {key: value for key, value in record["metrics"].items() if key != "bottleneck_stage"}
        for record in story.records
    ]
    assert rows[-1]["progress"] == 100


def test_nodes_of_both_types_come_and_go(story: Story) -> None:
    """Each is probed when it comes, is idle afterwards, and ends; the head's service stays."""
    nodes = {one["node_id"]: one for one in story.status["nodes"]}
    types = description()["available_node_types"]
    (head,) = [one for one in nodes.values() if one["is_head"]]
    assert head["resources"]["CPU"] == types["head"]["resources"]["CPU"]
    for (node_id, _, _), name in zip(
        story.seen_by_second[1:], ("data-prep", "training"), strict=True
    ):
        node = nodes[node_id]
        for resource, amount in types[name]["resources"].items():
            assert node["resources"][resource] == amount
    for node in nodes.values():
        assert node["probed"], node["error"]
        assert (node["left_s"] is None) == node["is_head"]
    assert head["left_s"] is None
    assert len(story.services) == 1, "the service was started anew"
    assert story.status["incarnation"] == 1
    cluster = story.run.config["cluster"]
    assert (cluster["node_count"], cluster["nodes_left"]) == (1, len(nodes) - 1)


def test_nothing_is_lost_with_the_nodes(story: Story) -> None:
    """All rows of nodes that have ended, with their disks, are delivered."""
    assert re.search(r"^lost +none", story.finished, re.MULTILINE), story.finished
    assert "rows missing" not in story.finished
    # On a busy machine a node may be gone before it was looked through: all of it had arrived.
    assert all(source["quiet"] for source in story.status["unconfirmed"])
    assert story.run.exit_code == 0
    assert not story.run.summary["raywb/rejected"]


def test_what_cannot_come_is_refused(story: Story) -> None:
    """More CPUs than cluster.yaml allows are refused at once, with what to change."""
    assert "cannot grow to 10000 CPUs" in story.refusal
    assert "max_workers" in story.refusal
    assert story.refused_after_s < 20.0


def test_the_environment_is_what_the_recipes_need() -> None:
    """cluster.yaml and the recipes name the same variables, with the same values."""
    assert environment_of_nodes() == XENNA_ENVIRONMENT


def test_a_node_says_that_it_owes_nothing_before_it_goes() -> None:
    """It is idle for longer than raywb waits before it looks through a silent node."""
    assert description()["idle_timeout_minutes"] * 60 > Settings().silent_after_s
