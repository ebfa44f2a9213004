"""What cannot work is told before data are prepared or anything is removed, and waiting is told."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training_case import settings, write_tokenizer

from recipes.errors import ClusterError, RecipeError, SettingsError, TrainingError
from recipes.settings import settings_as_dict
from recipes.stages.layout import OutputLayout
from recipes.terminal import Terminal
from recipes.tracking import TrackedRun
from recipes.training import workers
from recipes.training.batches import Batch, Samples
from recipes.training.checkpoints import Checkpoint, CheckpointFolder, Standing
from recipes.training.launch import check_start, train_on_cluster
from recipes.training.settings import TrainSettings
from recipes.training.workers import Cluster, Workers, choose_workers


def fill(folder: Path) -> None:
    for name in ("model.pt", "optimizer.pt", "tokenizer.json"):
        (folder / name).write_text(name)


def write_checkpoint(layout: OutputLayout, wanted: TrainSettings, step: int = 3) -> Checkpoint:
    """Leave what a training of these settings would have, as far as the driver looks at it."""
    folder = CheckpointFolder(layout.checkpoints)
    folder.prepare()
    plain = settings_as_dict(wanted)
    identity = {
        "recipe": "test",
        "model": plain["model"],
        "train": {"seed": wanted.seed, "batch_size": wanted.batch_size},
        "data": {},
    }
    return folder.write(identity, Standing(step=step), fill)


@pytest.fixture
def layout(tmp_path: Path) -> OutputLayout:
    layout = OutputLayout(tmp_path / "out")
    layout.create()
    return layout


def test_init_from_is_looked_at_before_data_are_prepared(
    tmp_path: Path, layout: OutputLayout
) -> None:
    """It must be there, with the model's shape; both shapes are told, and which keys to set."""
    check_start(settings(), layout)
    with pytest.raises(TrainingError, match=r"init_from=.*/nothing: no checkpoint lies there"):
        check_start(settings(init_from=str(tmp_path / "nothing")), layout)
    other = OutputLayout(tmp_path / "other")
    write_checkpoint(other, settings())
    check_start(settings(init_from=str(other.root)), layout)
    with pytest.raises(TrainingError) as error:
        check_start(settings(init_from=str(other.root), model={"heads": 1, "layers": 2}), layout)
    assert "(layers=1, hidden_size=32, heads=2) than" in str(error.value)
    assert "(layers=2, hidden_size=32, heads=1): set" in str(error.value)
    assert str(error.value).endswith("set train.model.layers=1 train.model.heads=2")


def test_init_from_says_nothing_where_an_own_checkpoint_is(
    tmp_path: Path, layout: OutputLayout
) -> None:
    """It may be dropped, moved, or be of another shape: the training goes on from its own."""
    write_checkpoint(layout, settings(init_from="/was/there"))
    for init_from in (None, str(tmp_path / "moved"), str(layout.root)):
        check_start(settings(init_from=init_from), layout)
    with pytest.raises(TrainingError, match="no checkpoint lies there"):
        check_start(settings(init_from=str(tmp_path / "moved"), resume=False), layout)


def test_an_own_checkpoint_of_another_training_is_told_at_the_start(layout: OutputLayout) -> None:
    """What settings alone say is compared; data are not known yet, and another batch is told."""
    write_checkpoint(layout, settings())
    with pytest.raises(TrainingError, match=r"train.seed was 7, now 8\. Set train.resume=false"):
        check_start(settings(seed=8), layout)
    check_start(settings(seed=8, resume=False), layout)
    with pytest.raises(SettingsError, match=r"batch_size=9 must be a multiple.* 2"):
        check_start(settings(batch_size=9, workers=None, use_gpu=False, resume=False), layout)


@dataclass(frozen=True)
class NoValidation:
    """Samples to train on, and none to validate with."""

    size: int

    def open(self, seed: int) -> tuple[Samples, Samples]:
        return self, NoValidation(0)

    def batch(self, places: Sequence[int]) -> Batch:
        raise AssertionError("nothing is trained here")


@dataclass
class Told:
    """A terminal, and what it was told."""

    out: io.StringIO
    terminal: Terminal

    def __call__(self) -> str:
        return self.out.getvalue()


@pytest.fixture
def told() -> Told:
    out = io.StringIO()
    return Told(out, Terminal(out, out))


def start(wanted: TrainSettings, layout: OutputLayout, told: Told) -> None:
    """Train on the cluster that ``ray`` says is there."""
    untracked = TrackedRun(None, None, print)
    train_on_cluster(
        "test", wanted, NoValidation(9), {}, layout=layout, run=untracked, terminal=told.terminal
    )


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two CPUs without an autoscaler, instead of the connected one."""
    cluster = Cluster({"CPU": 2}, lambda: {"CPU": 2}, autoscaled=False)
    monkeypatch.setattr(Cluster, "connected", classmethod(lambda _: cluster))


@pytest.mark.usefixtures("two_cpus")
def test_training_anew_removes_nothing_before_all_is_checked(
    layout: OutputLayout, told: Told
) -> None:
    """Refused for its workers, its data or its first weights: the checkpoints are still there."""
    pytest.importorskip("torch", reason="the lane for the newest cosmos-xenna has no torch")
    write_tokenizer(layout.tokenizer)
    kept = write_checkpoint(layout, settings())
    best = {"artifacts": "best"}
    refusals: list[tuple[dict[str, Any], type[RecipeError], str]] = [
        ({"workers": 4}, ClusterError, "need 4 CPUs, and the cluster has 2"),
        ({"batch_size": 9}, SettingsError, "batch_size=9"),
        ({"init_from": str(layout.root)}, TrainingError, "copy it to another place first"),
        ({"init_from": str(kept.path)}, TrainingError, "that train.resume=false removes"),
        ({"checkpoints": best}, SettingsError, "best needs validation, and the prepared data"),
    ]
    for changes, kind, message in refusals:
        with pytest.raises(kind, match=message):
            start(settings(resume=False, **changes), layout, told)
        assert CheckpointFolder(layout.checkpoints).newest() == kept
    assert "Validation is left out: the prepared data have no sample for it" in told()


@pytest.mark.usefixtures("two_cpus")
def test_what_all_workers_found_is_the_trainings_end(
    layout: OutputLayout, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own words are raised, though nothing failed as Ray Train sees it; not another start's.

    In place of Ray Train, a function that leaves what the workers would.
    """
    pytest.importorskip("torch", reason="the lane for the newest cosmos-xenna has no torch")
    write_tokenizer(layout.tokenizer)
    folder = CheckpointFolder(layout.checkpoints)
    monkeypatch.setattr(
        "recipes.training.launch._fit", lambda *_: folder.tell_failure("the gradient is nan")
    )
    with pytest.raises(TrainingError, match=r"^the gradient is nan$"):
        start(settings(), layout, told)
    monkeypatch.setattr("recipes.training.launch._fit", lambda *_: None)
    with pytest.raises(TrainingError, match="no checkpoint of its last step"):
        start(settings(), layout, told)


def chosen(
    total: Mapping[str, float],
    free: Mapping[str, float] | None = None,
    *,
    autoscaled: bool = False,
    **changes: Any,
) -> tuple[Workers, list[str]]:
    """Choose workers on a cluster that has this; return them and what was told."""
    said: list[str] = []
    cluster = Cluster(total, lambda: total if free is None else free, autoscaled)
    return choose_workers(settings(**changes), cluster, said.append), said


def test_a_busy_cluster_is_waited_for_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed, free and there; nothing is said where all is free, or is so in a moment."""
    assert chosen({"CPU": 8}) == (Workers(2, False, 1), [])
    monkeypatch.setattr(workers, "_GIVEN_BACK_S", 0.0)
    two, said = chosen({"CPU": 8, "GPU": 4}, {"CPU": 8}, workers=2)
    assert (two.count, two.on_gpu) == (2, True)
    assert len(said) == 1
    assert "for 2 GPUs: 0 of 4 are free" in said[0]


def test_what_a_pipeline_gives_back_is_not_called_busy() -> None:
    """Ray needs a moment to count what was freed."""
    states = [{"CPU": 0.0}, {"CPU": 1.0}, {"CPU": 4.0}]
    said: list[str] = []
    cluster = Cluster({"CPU": 4}, lambda: states.pop(0), autoscaled=False)
    choose_workers(settings(), cluster, said.append)
    assert said == []
    assert states == []


def test_a_cluster_that_cannot_grow_is_refused_at_once() -> None:
    """What is lacking and which keys help; with an autoscaler it is waited for instead."""
    with pytest.raises(ClusterError, match=r"need 3 GPUs, and the cluster has 2 and no autoscal"):
        chosen({"CPU": 8, "GPU": 2}, workers=3)
    with pytest.raises(ClusterError, match=r"need 6 CPUs.* train.workers or train.cpus_per_worker"):
        chosen({"CPU": 4}, workers=2, cpus_per_worker=3)
    _, said = chosen({"CPU": 8, "GPU": 2}, workers=3, autoscaled=True)
    assert len(said) == 1
    assert "need 3 GPUs, and the cluster has 2: waiting up to 10 minutes" in said[0]
    with pytest.raises(SettingsError, match=r"no GPU now: train.use_gpu=null takes CPUs"):
        chosen({"CPU": 8}, use_gpu=True, workers=None)
    with pytest.raises(SettingsError, match=r"no GPU now: set train.workers too"):
        chosen({"CPU": 8}, use_gpu=True, workers=None, autoscaled=True)


def test_cpus_are_told_where_an_autoscaler_could_bring_gpus() -> None:
    """Only where nobody said which, and there is an autoscaler."""
    two, said = chosen({"CPU": 8}, autoscaled=True)
    assert not two.on_gpu
    assert len(said) == 1
    assert "train.use_gpu=true train.workers=N asks the autoscaler" in said[0]
    assert chosen({"CPU": 8}, autoscaled=True, use_gpu=False)[1] == []
