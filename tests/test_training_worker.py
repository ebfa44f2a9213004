"""One worker, in this process, by Ray Train's local mode: what it learns from, and goes on from."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training_case import common, settings, write_data, write_packs, write_tokenizer

from recipes.errors import TrainingError
from recipes.pretrain.train import WindowSource, find_windows
from recipes.sft.train import PackSource, find_packs
from recipes.stages.layout import OutputLayout
from recipes.tracking import TrackedRun
from recipes.training.batches import Batch, Samples, SampleSource
from recipes.training.checkpoints import CheckpointFolder
from recipes.training.launch import _in_words, _make_task
from recipes.training.settings import TrainSettings

torch = pytest.importorskip("torch", reason="the lane for the newest cosmos-xenna has no torch")

Train = Callable[[OutputLayout, SampleSource, TrainSettings], CheckpointFolder]


class Ended(Exception):
    """The workers ended the training themselves: Ray Train saw no failure, and retries nothing."""


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains with one worker, whose process group it is alone in."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from recipes.training.worker import work

    def train_here(
        layout: OutputLayout, source: SampleSource, wanted: TrainSettings
    ) -> CheckpointFolder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        untracked = TrackedRun(None, None, print)
        task = _make_task("test", wanted, source, {}, layout, untracked)
        task.folder.prepare()
        trainer = TorchTrainer(
            work, train_loop_config={"task": task}, scaling_config=ScalingConfig(num_workers=0)
        )
        try:
            trainer.fit()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        if (failure := task.folder.failure()) is not None:
            raise Ended(failure)
        return task.folder

    return train_here


def windows(layout: OutputLayout) -> WindowSource:
    return find_windows(settings(), layout)[0]


def packs(layout: OutputLayout) -> PackSource:
    return find_packs(layout)[0]


def weights(folder: CheckpointFolder) -> dict[str, Any]:
    newest = folder.newest()
    assert newest is not None
    return torch.load(newest.model, weights_only=True)  # type: ignore[no-any-return]


class Broken(Exception):
    """What ends a training in its middle."""


@dataclass(frozen=True)
class BreaksAt:
    """Samples that cannot be read from a place on."""

    source: SampleSource
    place: int

    def open(self, seed: int) -> tuple[Samples, Samples]:
        training, validation = self.source.open(seed)
        return _Breaking(training, self.place), validation


class _Breaking:
    def __init__(self, samples: Samples, place: int) -> None:
        self._samples = samples
        self._place = place
        self.size = samples.size

    def batch(self, places: Sequence[int]) -> Batch:
        if places[-1] >= self._place:
            raise Broken
        return self._samples.batch(places)


def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path: Path, train: Train) -> None:
    """Broken off behind a checkpoint and started again: the same weights, to the last bit."""
    wanted = settings(steps=10, checkpoints={"every_steps": 3})
    unbroken = write_data(tmp_path / "unbroken")
    broken = write_data(tmp_path / "broken")
    expected = weights(train(unbroken, windows(unbroken), wanted))
    with pytest.raises(Broken):
        train(broken, BreaksAt(windows(broken), place=8 * wanted.batch_size), wanted)
    newest = CheckpointFolder(broken.checkpoints).newest()
    assert newest is not None
    assert newest.standing.step == 6
    folder = train(broken, windows(broken), wanted)
    found = weights(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    standing = [CheckpointFolder(one.checkpoints).newest() for one in (unbroken, broken)]
    losses = [one.standing.losses for one in standing if one]
    assert losses[0] == losses[1]


def test_a_changed_weight_decay_counts_from_the_next_start_on(tmp_path: Path, train: Train) -> None:
    """It is that of the settings, not of the checkpoint; norms have none in either case."""
    layout = write_data(tmp_path)
    train(layout, windows(layout), settings(steps=1))
    changed = settings(steps=2, optimizer={"weight_decay": 0.7})
    newest = train(layout, windows(layout), changed).newest()
    assert newest is not None
    groups = torch.load(newest.optimizer, weights_only=True)["param_groups"]
    assert newest.standing.step == 2
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]


def test_another_trainings_checkpoint_ends_the_workers(tmp_path: Path, train: Train) -> None:
    """Should the driver have seen another one: its words are told, and nothing is retried."""
    layout = write_data(tmp_path)
    train(layout, windows(layout), settings(steps=1))
    with pytest.raises(Ended, match=r"train\.seed was 7, now 8"):
        train(layout, windows(layout), settings(steps=2, seed=8))


def test_sft_begins_with_pretrained_weights(tmp_path: Path, train: Train) -> None:
    """The weights are taken over, a grown vocabulary's too, and the loss goes on falling."""
    pretraining = write_data(tmp_path / "pretrain")
    before = train(pretraining, windows(pretraining), settings(steps=30))
    layout = write_packs(tmp_path / "sft", vocabulary=70)
    wanted = common(
        settings(
            steps=15,
            init_from=str(pretraining.root),
            validation={"every_steps": 5},
            checkpoints={"every_steps": 5},
        )
    )
    folder = train(layout, packs(layout), dataclasses.replace(wanted, steps=1))
    pretrained, tuned = weights(before), weights(folder)
    first = folder.newest()
    assert first is not None
    assert tuned["embedding.weight"].shape == (128, 32)
    assert torch.allclose(
        tuned["blocks.0.attention_in.weight"], pretrained["blocks.0.attention_in.weight"], atol=0.02
    )
    known = before.newest()
    assert known is not None
    assert known.standing.losses.validation is not None
    assert first.standing.losses.last == pytest.approx(known.standing.losses.validation, abs=0.5)
    last = train(layout, packs(layout), wanted).newest()
    assert last is not None
    assert last.standing.step == 15
    assert last.standing.losses.validation is not None
    assert first.standing.losses.validation is not None
    assert last.standing.losses.validation < first.standing.losses.validation


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, train: Train) -> None:
    """Another shape, or a tokenizer whose tokens have other ids: the message says what to set."""
    layout = write_data(tmp_path / "pretrain")
    train(layout, windows(layout), settings(steps=1))
    small = write_data(tmp_path / "small")
    write_tokenizer(small.tokenizer, 20)
    init = str(layout.checkpoints)
    with pytest.raises(Ended, match="another tokenizer: 28 of its 48 tokens"):
        train(small, windows(small), settings(steps=1, init_from=init))
    other = write_data(tmp_path / "other")
    with pytest.raises(TrainingError, match=r"set train\.model\.layers=1$"):
        train(other, windows(other), settings(steps=1, init_from=init, model={"layers": 2}))
    with pytest.raises(TrainingError, match="no checkpoint lies there"):
        train(other, windows(other), settings(steps=1, init_from=str(tmp_path)))


def test_the_best_weights_have_a_checkpoint_of_their_own(tmp_path: Path, train: Train) -> None:
    """With artifacts=best, one is written whenever a validation is better than all before it."""
    layout = write_data(tmp_path)
    kept = {"every_steps": 100, "keep_last": 9, "artifacts": "best"}
    wanted = settings(steps=14, validation={"every_steps": 4}, checkpoints=kept)
    folder = train(layout, windows(layout), wanted)
    found = [folder.of_step(step).standing.losses for step in (4, 8, 12, 14)]
    assert all(one.validation == one.best_validation for one in found)


def test_the_learning_rate_rises_and_falls() -> None:
    """Up in a line to the highest, down to the lowest at the last step, and no further."""
    from recipes.training.worker import learning_rate

    slope = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 4}
    wanted = settings(steps=20, optimizer=slope)
    rates = [learning_rate(step, wanted) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[11] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    at_once = settings(steps=20, optimizer={**slope, "warmup_steps": 0})
    assert learning_rate(1, at_once) == pytest.approx(1.0, rel=0.01)


def test_a_gradient_that_is_no_number_ends_the_training(tmp_path: Path, train: Train) -> None:
    """It is said at which step, and what helps; the checkpoint before it is kept.

    No worker fails by it: one that did would be started again, to find the same.
    """
    layout = write_data(tmp_path)
    wild = {"learning_rate": 1e30, "min_learning_rate": 1e30, "clip_grad_norm": None}
    wanted = settings(steps=20, optimizer=wild, checkpoints={"every_steps": 1})
    with pytest.raises(Ended, match=r"gradient is \w+ at step \d+: lower"):
        train(layout, windows(layout), wanted)
    assert CheckpointFolder(layout.checkpoints).newest() is not None


def test_a_failed_worker_is_told_in_its_own_words() -> None:
    """The cause, not what the ranks said whose connection to the failed one broke."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    of_rank_1 = ValueError("token 70000 is not in the vocabulary")
    failures = {0: RuntimeError("[gloo/transport] Connection closed by peer"), 1: of_rank_1}
    told = _in_words(WorkerGroupError("two workers", failures))
    assert isinstance(told, TrainingError)
    assert str(told) == (
        "training worker 1 failed: ValueError: token 70000 is not in the vocabulary"
    )
    own = TrainingError("the gradient is nan at step 7")
    assert _in_words(WorkerGroupError("", {0: own, 1: own})) is own
    assert "no reason given" in str(_in_words(WorkerGroupError("", {0: OSError()})))
