"""`raywb charts` saves charts of what raywb really logs, once, with W&B's own package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_runs import ENTITY, PROJECT, fleet_environment
from local_service import LocalService, local_service
from test_utilization import RECORDED
from wandb_client import API_KEY
from wandb_file import read_runs
from wandb_server import WandbServer

from raywb.charts.panels import Panel, recommended_sections
from raywb.charts.saving import save_charts, stages_of
from raywb.errors import KeyMissing, RaywbError
from raywb.nodes.utilization import metrics_of, parse_metrics
from raywb.settings import Settings

TRAINING = "training/operator"


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer(entity=ENTITY, api_key=API_KEY) as server:
        server.store.projects.add((ENTITY, PROJECT))
        yield server


def settings(server: WandbServer, **changes: Any) -> Settings:
    return Settings(**{"project": PROJECT, "base_url": server.url, **changes})


def run_charts(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raywb", "charts", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def sections_of(spec: str) -> dict[str, list[dict[str, Any]]]:
    """Configurations of the panels of a view, by section."""
    sections = json.loads(spec)["section"]["panelBankConfig"]["sections"]
    return {one["name"]: [panel["config"] for panel in one["panels"]] for one in sections}


def test_one_view_is_made_and_brought_up_to_date(server: WandbServer, tmp_path: Path) -> None:
    """The command makes a view with every panel; again, it changes that one, and no second comes.

    What the user added in the app, a section and a panel of his own, is still there.
    """
    environment = fleet_environment(tmp_path, server)
    del environment["WANDB_ENTITY"]  # then it is the key's own
    made = run_charts(environment, "--stage", TRAINING)
    assert made.returncode == 0, made.stderr
    (view,) = server.store.views
    count = sum(len(section.panels) for section in recommended_sections([TRAINING]))
    address = f"{server.url}/{ENTITY}/{PROJECT}?nw={view.name.split('-')[1]}"
    assert made.stdout == f"✓ {count} charts made: {address}\n"
    assert (view.entity, view.project, view.display_name) == (ENTITY, PROJECT, "raywb")
    assert view.type == "project-view"

    spec = json.loads(view.spec)
    sections = spec["section"]["panelBankConfig"]["sections"]
    own = {**sections[0]["panels"][0], "__id__": "own"}
    own["config"] = {**own["config"], "chartTitle": "mine", "metrics": ["mine"]}
    kept = [panel["__id__"] for panel in sections[0]["panels"]]
    sections[0]["panels"].insert(0, own)
    sections[0]["panels"][1]["config"]["chartTitle"] = "renamed"
    sections.insert(0, {**sections[1], "name": "My own", "panels": [own]})
    view.spec = json.dumps(spec)

    again = run_charts(environment, "--stage", TRAINING)
    assert again.stdout == f"✓ {count} charts up to date: {address}\n", again.stderr
    (view,) = server.store.views
    assert view.saved == 2
    assert server.errors == []
    found = sections_of(view.spec)
    wanted = [section.name for section in recommended_sections([TRAINING])]
    assert list(found) == ["My own", *wanted]
    titles = [config["chartTitle"] for config in found["Pipeline"]]
    ours = [panel.title for panel in recommended_sections()[0].panels]
    assert titles == [*ours, "mine", "renamed"]
    panels = json.loads(view.spec)["section"]["panelBankConfig"]["sections"][1]["panels"]
    assert [panel["__id__"] for panel in panels[1:4]] == kept[1:], "what was right is untouched"


def test_the_view_has_each_panel_over_its_axis(server: WandbServer, tmp_path: Path) -> None:
    """The saved JSON names metrics, patterns and axes as W&B's app reads them."""
    environment = fleet_environment(tmp_path, server)
    saved = save_charts(settings(server), environment, stages=[TRAINING], title="axes")
    view = next(one for one in server.store.views if one.display_name == "axes")
    assert saved.is_new
    found = sections_of(view.spec)
    for section in recommended_sections([TRAINING]):
        for panel, config in zip(section.panels, found[section.name], strict=True):
            assert config["chartTitle"] == panel.title
            assert config["xAxis"] == (panel.x or "_step")
            assert config.get("metrics", []) == list(panel.y)
            assert config.get("metricRegex") == panel.y_regex
            assert config.get("useMetricRegex", False) is (panel.y_regex is not None)
    progress = found["Pipeline"][1]
    assert progress["metrics"] == ["xenna/inputs_processed_per_s", "xenna/outputs_per_s"]
    assert progress["xAxis"] == "xenna/pipeline_duration_s"


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names that raywb logs: a pipeline, a training of two ranks, one of them late, and nodes."""
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as service:
        names = _train(service)
    reading = parse_metrics(RECORDED)
    return names | {*metrics_of({"host": reading}, 1), "nodes/time_s"} | _pipeline(tmp_path)


def _train(service: LocalService) -> set[str]:
    service.up()
    service.start(rank_wait_s=0.2)
    clients = [service.client(TRAINING, rank=rank, world_size=2) for rank in range(2)]
    for client in clients:
        client.log({"loss": 1.0, "tokens_per_s": 10.0, "bad": object()}, step=0)
        assert client.flush(20.0)
    clients[0].log({"loss": 0.5}, step=1)
    assert clients[0].flush(20.0)
    service.wait_for(lambda status: status.outbox_rows >= 2)
    clients[1].log({"loss": 0.5}, step=1)
    for client in clients:
        assert client.flush(20.0)
    assert service.service is not None
    report = service.service.finish(60.0, 0)
    (run,) = (one for one in read_runs(service.directory).values() if one.run_id == report.run.id)
    return {key for row in run.history for key in row}


def _pipeline(directory: Path) -> set[str]:
    """What a pipeline logs: xenna's own monitor and pools, tasks finished by hand."""
    from xenna_cases import Monitored, make_hook, no_cluster, read_records

    path = directory / "stats.jsonl"
    with no_cluster(), make_hook(path):
        pipeline = Monitored("PlanStage", "DownloadStage", num_inputs=2)
        pipeline.snapshot(2)
        pipeline.finish_tasks(0, 2, busy_s=6)
        pipeline.finish_tasks(1, 2, busy_s=1)
        pipeline.stop()
    return {f"xenna/{key}" for record in read_records(path) for key in record["metrics"]}


#: Logged only where something is lost, or once xenna knows a speed: SPEC has the names.
_NOT_ALWAYS = {"raywb/lost/disk_full", "xenna/stage/plan_stage/speed_tasks_per_s"}


@pytest.mark.xenna
def test_every_panel_shows_what_is_logged(logged: set[str]) -> None:
    """Each metric, pattern and axis of each panel is one that rows of a run have."""
    there = logged | _NOT_ALWAYS

    def is_empty(panel: Panel) -> bool:
        names = [name for name in panel.y if name not in there]
        if panel.x is not None and panel.x not in there:
            names.append(panel.x)
        pattern = panel.y_regex
        return bool(names) or (
            pattern is not None and not any(re.search(pattern, name) for name in there)
        )

    sections = recommended_sections([TRAINING])
    assert [panel for section in sections for panel in section.panels if is_empty(panel)] == []


def test_stages_are_those_that_train() -> None:
    """Without a run there are the recipes' stages; of a run, those that train or validate."""
    assert stages_of(None) == [
        "training/pretrain",
        "validation/pretrain",
        "training/sft",
        "validation/sft",
    ]


def test_what_is_missing_is_said_in_a_sentence(server: WandbServer, tmp_path: Path) -> None:
    """No key, offline, no project, a wrong key, no package: what to do, and never the key."""
    environment = fleet_environment(tmp_path, server)
    without_key = {key: value for key, value in environment.items() if key != "WANDB_API_KEY"}
    hidden = tmp_path / "hidden"
    (hidden / "wandb_workspaces").mkdir(parents=True)
    (hidden / "wandb_workspaces" / "__init__.py").write_text("raise ImportError('not here')")
    path = f"{hidden}:{environment['PYTHONPATH']}"
    wrong = "f" * 40
    cases = [
        (without_key, "there is no key for"),
        (environment | {"WANDB_MODE": "offline"}, "W&B is offline here: `raywb sync DIR`"),
        (environment | {"WANDB_PROJECT": "nope"}, "has no project robots/nope"),
        (environment | {"WANDB_API_KEY": wrong}, "does not let this key in"),
        (environment | {"PYTHONPATH": path}, "pip install 'raywb[charts]'"),
    ]
    for case, text in cases:
        ended = run_charts(case)
        assert ended.returncode == 1, text
        assert text in ended.stderr
        assert ended.stderr.startswith("raywb: ")
        assert ended.stderr.count("\n") == 1
        assert API_KEY not in ended.stderr
        assert wrong not in ended.stderr


def test_a_server_that_hangs_costs_a_set_time(tmp_path: Path) -> None:
    """The process that saves is ended, and the error says that nothing was saved."""
    with WandbServer(entity=ENTITY) as server:
        server.hang("graphql")
        environment = fleet_environment(tmp_path, server)
        with pytest.raises(RaywbError, match=r"are not in .*sky: no answer within 2 s"):
            save_charts(settings(server), environment, timeout_s=2.0)


def test_a_key_is_looked_for_before_anything_is_started(server: WandbServer) -> None:
    """Without one, nobody is asked."""
    before = server.requests["graphql"]
    with pytest.raises(KeyMissing):
        save_charts(settings(server), {})
    assert server.requests["graphql"] == before


def test_the_help_says_whose_project_it_is(server: WandbServer, tmp_path: Path) -> None:
    """The environment's project comes before the cluster's, which then is not even looked for."""
    environment = fleet_environment(tmp_path, server, RAY_ADDRESS="127.0.0.1:1")
    assert "WANDB_PROJECT" in environment
    made = run_charts(environment, "--title", "no cluster")
    assert made.returncode == 0, made.stderr
    said = " ".join(run_charts(environment, "--help").stdout.split())
    assert "by default WANDB_PROJECT, else that of the cluster's run" in said
    assert "by default WANDB_ENTITY, else that of the run" in said
