"""The page "Coming from wandb": both columns run, and W&B's two files say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import RayCluster
from wandb_client import run_client
from wandb_file import WandbRun, read_runs

PAGE = Path(__file__).parents[1] / "raywb" / "README.md"

#: What the blocks of the page find as theirs, and what is asked of them when all have run.
GIVEN = "rank, loss = 0, 0.5\n"
ASKED = """
from ray_cluster import report
callbacks = [run_config.callbacks[0], tune_config.callbacks[0]]
report([[one.stage, one.checkpoints] for one in callbacks])
"""


def blocks() -> tuple[list[str], list[str], list[str]]:
    """The page's Python: the left column, the right one, and what stands below the table."""
    table, below = PAGE.read_text().split("</table>")
    cells = re.findall(r"```python\n(.*?)```", table, re.DOTALL)
    assert len(cells) == 18
    return cells[::2], cells[1::2], re.findall(r"```python\n(.*?)```", below, re.DOTALL)


def points(run: WandbRun, key: str, axis: str) -> list[tuple[Any, Any]]:
    return [(row[axis], row[key]) for row in run.history if key in row]


def table(directory: Path, run: WandbRun, key: str) -> tuple[list, list]:
    """Columns and rows of the table under a key."""
    (name,) = {Path(path).name for path in run.values(f"{key}.path")}
    (path,) = {path.resolve() for path in directory.rglob(name)}
    content = json.loads(path.read_text())
    return content["columns"], content["data"]


@pytest.mark.ray
def test_both_columns_write_the_same(cluster: RayCluster, tmp_path: Path) -> None:
    """Config, points on their axes, summary, table, artifact, alert and the runs' own names."""
    pytest.importorskip("tensorboardX", reason="ray[train] is not installed")
    left, right, below = blocks()
    *body, end = right
    assert "finish" in end
    run_client("".join(left), tmp_path).check_returncode()
    ours = tmp_path / "ours"
    ours.mkdir()
    script = GIVEN + "\n".join([*body, *below, end]) + ASKED
    callbacks = cluster.run_driver(script, {"RAYWB_DIR": str(ours), "WANDB_MODE": "offline"})
    assert callbacks == [["training/pretrain", True], ["tune", False]]
    theirs = {run.job_type: run for run in read_runs(tmp_path / "wandb").values()}
    mine = {run.job_type: run for run in read_runs(ours).values()}
    assert theirs.keys() == mine.keys() == {"train", "classify"}

    one, other = theirs["train"], mine["train"]
    for name in ("project", "name", "group", "job_type", "tags", "exit_code"):
        assert getattr(one, name) == getattr(other, name), name
    assert {key: other.config[key] for key in one.config} == one.config == {"lr": 0.1, "batch": 8}
    assert points(one, "train/loss", "_step") == points(other, "train/loss", "train/step")
    valid = points(one, "valid/accuracy", "valid/step")
    assert (
        valid == points(other, "valid/accuracy", "valid/step") == [(20, 0.2), (10, 0.1), (30, 0.3)]
    )
    definition = one.metrics["valid/*"]
    assert definition.step_metric == other.metrics["valid/accuracy"].step_metric == "valid/step"
    assert definition.summary == other.metrics["valid/accuracy"].summary
    assert one.summary["train/best"] == other.summary["train/best"] == 0.25
    assert one.summary["valid/accuracy"]["max"] == 0.3 == other.summary["valid/accuracy"]["max"]
    assert table(tmp_path / "wandb", one, "train/samples") == table(ours, other, "train/samples")
    assert [(a.name, a.type, a.paths, a.digest) for a in one.artifacts if a.type == "model"] == [
        (a.name, a.type, a.paths, a.digest) for a in other.artifacts if a.type == "model"
    ]
    assert one.alerts == other.alerts == [("Slow", "step 2")]

    one, other = theirs["classify"], mine["classify"]
    assert (one.run_id, one.group) == (other.run_id, other.group) == ("classify-1", "papers")
    assert points(one, "accuracy", "_step") == points(other, "accuracy", "step") == [(3, 0.95)]


def test_what_the_page_says_of_rows_that_wait() -> None:
    """Numbers on the page are those of the code."""
    from raywb import rows_aside
    from raywb.service import rank_status

    text = PAGE.read_text()
    assert f"At most {rows_aside.MOST_ROWS} rows wait" in text
    assert rows_aside.LONGEST_WAIT_S == 60
    assert f"silent for {rank_status.LAG_S:g} s" in text
    assert f"logged for {rank_status.STALL_S:g} s" in text
