"""The Grafana dashboard and ``raywb grafana``, without Ray and without Grafana."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from raywb.cli import EXIT_DIRECTORY, main
from raywb.errors import DirectoryError
from raywb.service.series_names import METRICS
from raywb.view.grafana.dashboard import FILE, dashboard, dashboard_text
from raywb.view.grafana.provisioning import nothing_here, provisioned, write_dashboard

PANELS = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_the_file_is_what_the_module_yields() -> None:
    """The package holds the dashboard as it is built: python -m raywb.view.grafana.dashboard."""
    assert FILE.read_text() == dashboard_text()


def test_rows_are_those_that_were_asked_for() -> None:
    """Pipelines, training, nodes and delivery, each with panels below it."""
    kinds = [panel["type"] == "row" for panel in dashboard()["panels"]]
    titles = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert titles == ["Pipelines", "Training", "Nodes", "Delivery"]
    assert not any(one and other for one, other in zip(kinds, [*kinds[1:], True], strict=True))


def test_queries_ask_for_series_that_there_are() -> None:
    """Every name is one of the service's, with labels that it has; and each name is shown."""
    shown = set()
    own = {"SessionName", "WorkerId"}
    for expression in expressions():
        for name, matchers in re.findall(r"ray_(raywb_\w+){([^}]*)}", expression):
            labels = set(re.findall(r"(\w+)=", matchers))
            assert labels <= {*METRICS[name].labels, *own}, expression
            assert "SessionName" in labels
            assert ("run" in labels) == ("run" in METRICS[name].labels)
            shown.add(name)
        by = {label for group in re.findall(r"by \(([^)]*)\)", expression)
              for label in re.findall(r"\w+", group)}  # fmt: skip
        assert by <= {label for metric in METRICS.values() for label in metric.labels}
    unseen = {"raywb_rows_outbox", "raywb_rows_after_finish", "raywb_pipeline_state"}
    unseen |= {"raywb_pipeline_duration_seconds", "raywb_pipeline_stage_actor_tasks_per_second"}
    unseen |= {"raywb_node_used_bytes", "raywb_node_gpus_idle"}
    assert shown == METRICS.keys() - unseen


def test_a_service_that_was_restarted_does_not_split_lines() -> None:
    """No query hands on WorkerId, by which Ray parts the series of two processes."""
    for expression in expressions():
        assert re.search(r"(max|sum) by \([^)]*\) \(", expression)
        assert "WorkerId" not in expression


def test_panels_are_explained_and_do_not_overlap() -> None:
    """Each has a title, a unit, a description, a place of its own and a number of its own."""
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith((".", "…"))
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    numbers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_variables_are_defined_before_they_are_used() -> None:
    """Each variable of a query is one of the dashboard's or Grafana's own."""
    variables = [one["name"] for one in dashboard()["templating"]["list"]]
    assert variables == ["datasource", "SessionName", "run", "metric"]
    used = set(re.findall(r"\$(\w+)", " ".join(expressions())))
    assert used == {"SessionName", "run", "metric", "__rate_interval"}


def test_a_run_is_linked_to_its_page() -> None:
    """The table of runs leads to W&B."""
    [table] = [panel for panel in PANELS if panel["type"] == "table"]
    [override] = table["fieldConfig"]["overrides"]
    [link] = override["properties"][0]["value"]
    assert (override["matcher"]["options"], link["url"]) == ("url", "${__value.raw}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What Ray writes for Grafana, as far as it is read."""
    root = tmp_path / "metrics"
    provisioning = root / "grafana" / "provisioning" / "dashboards"
    provisioning.mkdir(parents=True)
    (root / "grafana" / "my boards").mkdir()
    (provisioning / "default.yml").write_text(
        "apiVersion: 1\n\nproviders:\n  - name: Ray\n    type: file\n    options:\n"
        f"      path: {root / 'grafana' / 'my boards'}\n"
    )
    return root


def test_the_folder_is_the_one_that_rays_configuration_names(folder: Path) -> None:
    """Where Ray's variables send dashboards elsewhere, ours go there, too."""
    found = provisioned(folder)
    assert found is not None
    assert found.dashboards == folder / "grafana" / "my boards"
    assert found.grafana_config == folder / "grafana" / "grafana.ini"
    assert found.prometheus_config == folder / "prometheus" / "prometheus.yml"
    assert provisioned(folder / "nowhere") is None
    (folder / "grafana/provisioning/dashboards/default.yml").write_text("providers: []")
    with pytest.raises(DirectoryError, match="--output"):
        provisioned(folder)


def test_a_second_run_replaces_the_file_whole(folder: Path) -> None:
    """Grafana reads the folder all the time: nothing half written ever ends in .json."""
    path = folder / "grafana" / "my boards" / "raywb.json"
    assert write_dashboard(path, "one") == "wrote"
    assert write_dashboard(path, "two") == "replaced"
    assert [(one.name, one.read_text()) for one in path.parent.iterdir()] == [("raywb.json", "two")]
    with pytest.raises(DirectoryError, match=r"nowhere.*--output"):
        write_dashboard(path.parent / "nowhere" / "raywb.json", "one")
    with pytest.raises(DirectoryError, match="--output"):
        write_dashboard(path / "raywb.json", "one")


def test_who_is_not_on_the_head_is_told_where_to_go() -> None:
    """The refusal says what is missing, where it is, and the way without it."""
    assert "not the head of the Ray cluster" in str(nothing_here("10.0.0.1"))
    assert "on 10.0.0.1, or write the dashboard to a file" in str(nothing_here("10.0.0.1"))
    assert "--include-dashboard=true" in str(nothing_here(None))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["grafana", *arguments])


def test_the_command_writes_anywhere_without_a_cluster(tmp_path: Path) -> None:
    """--output FILE needs no Ray, says what to do with the file, and - prints it."""
    path = tmp_path / "raywb.json"
    done = run("--output", str(path))
    assert done.exit_code == 0, done.output
    assert f"✓ wrote {path}" in done.output
    assert "Import" in done.output
    assert json.loads(path.read_text()) == dashboard()
    assert json.loads(run("--output", "-").output) == dashboard()
    done = run("--output", str(tmp_path / "nowhere" / "raywb.json"))
    assert done.exit_code == EXIT_DIRECTORY
    assert "cannot be written" in done.output
