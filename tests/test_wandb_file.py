"""What the reader of W&B's files gives back is what the real client was told."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from wandb_client import run_client
from wandb_file import BLOCK_SIZE, HEADER_SIZE, MetricDefinition, WandbRun, read_run, read_runs

#: A value for every shape that a row, a config or a summary may take.
RICH = """
    import pathlib, wandb
    run = wandb.init(
        project="colours", entity="team", id="rich", group="g", job_type="train", name="First",
        tags=["a"], config={"lr": 0.1, "model": {"depth": 2}},
    )
    run.define_metric("train/step")
    run.define_metric("train/*", step_metric="train/step", summary="max")
    run.define_metric("loss", summary="min,mean")
    for i in range(3):
        run.log({"train/step": 10 * i, "train/acc": i / 4, "loss": 3.0 - i})
    run.log({
        "text": "grün\\n", "truth": True, "none": None, "list": [1, 2], "deep": {"er": {"x": 1.5}},
        "a.b": 7, "nan": float("nan"), "inf": float("-inf"), "long": "x" * 100_000,
    })
    run.log({})
    run.log({"jump": 1}, step=20, commit=True)
    run.config.update({"lr": 0.2, "late": [1]}, allow_val_change=True)
    run.summary["best"] = {"step": 1}
    run.summary["best"]["loss"] = 0.5
    run.summary["gone"] = 1
    del run.summary["gone"]
    run.tags = ("a", "b")
    pathlib.Path("data.txt").write_text("hello")
    artifact = wandb.Artifact("numbers", "dataset")
    artifact.add_file("data.txt")
    run.log_artifact(artifact)
    run.alert("Hot", "GPU 3")
    run.finish(exit_code=EXIT)
"""


def write(script: str, home: Path) -> None:
    """Let the real client run a script to its end."""
    ended = run_client(script, home)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def rich_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of one offline run that uses what W&B has."""
    home = tmp_path_factory.mktemp("rich")
    write(RICH.replace("EXIT", "0"), home)
    (path,) = home.glob("wandb/offline-run-*/run-rich.wandb")
    return path


@pytest.fixture(scope="module")
def rich(rich_file: Path) -> WandbRun:
    return read_run(rich_file)


def test_identity(rich: WandbRun) -> None:
    """A run's names, group, tags, artifacts and alerts are read back."""
    assert (rich.run_id, rich.project, rich.entity) == ("rich", "colours", "team")
    assert (rich.group, rich.job_type, rich.name) == ("g", "train", "First")
    assert rich.tags == ("a", "b")
    assert rich.alerts == [("Hot", "GPU 3")]
    (artifact,) = rich.artifacts
    assert (artifact.name, artifact.type, artifact.paths) == ("numbers", "dataset", ("data.txt",))
    assert (rich.exit_code, rich.damaged, rich.torn) == (0, 0, 0)


def test_history(rich: WandbRun) -> None:
    """Every row is read back in order, with its step, nested paths joined with dots."""
    assert rich.steps == [0, 1, 2, 3, 4, 20]
    assert rich.values("train/acc") == [0, 0.25, 0.5]
    assert rich.values("train/step") == [0, 10, 20]
    row = rich.history[3]
    assert row["text"] == "grün\n"
    assert row["truth"] is True
    assert row["none"] is None
    assert row["list"] == [1, 2]
    assert (row["deep.er.x"], row["a.b"]) == (1.5, 7)
    assert math.isnan(row["nan"])
    assert row["inf"] == -math.inf
    assert row["long"] == "x" * 100_000  # a record over several blocks
    assert rich.history[4].keys() == {"_step", "_timestamp", "_runtime"}
    assert rich.values("_timestamp") == sorted(rich.values("_timestamp"))


def test_definitions(rich: WandbRun) -> None:
    """Metric definitions are read back by name or glob, without W&B's own expansions."""
    assert rich.metrics == {
        "train/step": MetricDefinition(),
        "train/*": MetricDefinition("train/step", frozenset({"max"})),
        "loss": MetricDefinition(None, frozenset({"min", "mean"})),
    }


def test_config_and_summary(rich: WandbRun) -> None:
    """Config and summary are the fold of all changes, aggregates and removals included."""
    assert rich.config == {"lr": 0.2, "model": {"depth": 2}, "late": [1]}
    assert rich.summary["loss"] == {"min": 1, "mean": 2}
    assert rich.summary["train/acc"] == {"max": 0.5}
    assert rich.summary["best"] == {"step": 1, "loss": 0.5}
    assert rich.summary["deep"] == {"er": {"x": 1.5}}
    assert rich.summary["_step"] == 20
    assert "gone" not in rich.summary


def test_torn_tail(rich: WandbRun, rich_file: Path, tmp_path: Path) -> None:
    """A file cut anywhere gives the rows before the cut and no damage."""
    data = rich_file.read_bytes()
    cut = tmp_path / "run-rich.wandb"
    whole = 0
    for length in [*range(0, 300), *range(300, len(data), 151), len(data) - 1]:
        cut.write_bytes(data[:length])
        run = read_run(cut)
        assert run.run_id == "rich"
        assert run.damaged == 0, length
        assert [repr(row) for row in run.history] == [
            repr(r) for r in rich.history[: len(run.steps)]
        ]
        assert len(run.history) >= whole
        whole = len(run.history)
        assert run.exit_code is None
    assert run.torn == 1


def test_flipped_byte(rich: WandbRun, rich_file: Path, tmp_path: Path) -> None:
    """A flipped byte costs what its block holds at most, is counted, and never raises."""
    data = bytearray(rich_file.read_bytes())
    flipped = tmp_path / "run-rich.wandb"
    for position in range(HEADER_SIZE, len(data), 331):
        data[position] ^= 0x40
        flipped.write_bytes(data)
        data[position] ^= 0x40
        run = read_run(flipped)
        # A trailer is filled with zeros that nobody reads, so a flip there harms nothing.
        assert run.damaged + run.torn > 0 or run.history[-1] == rich.history[-1]
        if position > 2 * BLOCK_SIZE:
            assert run.values("loss") == rich.values("loss")


def test_not_a_log(tmp_path: Path) -> None:
    """Another file is refused, with what it begins with; an empty one is a run just begun."""
    path = tmp_path / "run-x.wandb"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="PK"):
        read_run(path)
    path.write_bytes(b"")
    assert read_run(path).run_id == "x"


def test_segments(tmp_path: Path) -> None:
    """Two segments of one run id join in the order of their start, other runs stay apart."""
    write(
        """
        import wandb
        with wandb.init(project="p", id="two", config={"a": 1, "b": 1}) as run:
            run.define_metric("x", summary="max")
            for i in range(4):
                run.log({"x": i, "early": i})
        with wandb.init(project="p", id="other") as run:
            run.log({"y": 1})
        run = wandb.init(project="p", id="two", config={"b": 2}, name="late")
        run.log({"x": 4}, step=4, commit=True)
        run.log({"x": 5})
        run.finish(exit_code=3)
        """,
        tmp_path,
    )
    runs = read_runs(tmp_path)
    assert runs.keys() == {"two", "other"}
    run = runs["two"]
    assert run.steps == [0, 1, 2, 3, 4, 5]
    assert run.values("x") == [0, 1, 2, 3, 4, 5]
    assert run.config == {"a": 1, "b": 2}
    assert (run.summary["early"], run.summary["x"]) == (3, 5)
    assert run.metrics["x"].summary == {"max"}
    assert (run.name, run.exit_code, len(run.segments)) == ("late", 3, 2)
    assert runs["other"].values("y") == [1]


def test_online_directory_and_failure(rich_file: Path, tmp_path: Path) -> None:
    """Directories of online runs count too, W&B's `latest-run` link does not count twice."""
    online = tmp_path / "wandb" / "run-20260101_000000-rich"
    shutil.copytree(rich_file.parent, online)
    (online.parent / "latest-run").symlink_to(online.name)
    runs = read_runs(tmp_path)
    assert len(runs["rich"].segments) == 1


def test_exit_code(tmp_path: Path) -> None:
    """The exit code is the script's: W&B writes 1 for one that ends in an exception."""
    ended = run_client("import wandb; wandb.init(project='p', id='bad'); raise OSError", tmp_path)
    assert ended.returncode == 1
    assert read_runs(tmp_path)["bad"].exit_code == 1
