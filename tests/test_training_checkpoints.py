"""A checkpoint is whole or not there, and only one of the same training is gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.errors import TrainingError
from recipes.training.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    Losses,
    Standing,
    find_checkpoint,
)

IDENTITY = {"model": {"layers": 2}, "data": {"blend_xxh64": "aa"}}


def fill(folder: Path) -> None:
    for name in ("model.pt", "optimizer.pt", "tokenizer.json"):
        (folder / name).write_text(name)


def write(folder: CheckpointFolder, step: int) -> Checkpoint:
    return folder.write(IDENTITY, Standing(step=step), fill)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.root.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.prepare()
    return folder


def test_it_comes_back_as_it_was_written(folder: CheckpointFolder) -> None:
    """Where it stands and what was trained are read from the disk; the highest step is newest."""
    assert folder.newest() is None
    standing = Standing(1000, 7, 2.5, Losses(1.25, 1.0, None, 0.5))
    written = folder.write(IDENTITY, standing, fill)
    write(folder, 999)
    assert folder.newest() == written
    assert written == Checkpoint(folder.root / "step-00001000", IDENTITY, standing)
    assert folder.of_step(999).standing.step == 999
    with pytest.raises(TrainingError, match="every node sees"):
        folder.of_step(5)


def test_a_failure_in_between_leaves_nothing(folder: CheckpointFolder) -> None:
    """A full disk in the middle: the checkpoint before it is the newest, and no file is left."""
    write(folder, 1)

    def full(path: Path) -> None:
        (path / "model.pt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.write(IDENTITY, Standing(step=2), full)
    assert names(folder) == ["step-00000001"]


@pytest.mark.parametrize("missing", ["model.pt", "optimizer.pt", "checkpoint.json"])
def test_what_is_not_whole_is_no_checkpoint(folder: CheckpointFolder, missing: str) -> None:
    """One that lacks a part is passed over, and replaced when its step comes again."""
    write(folder, 1)
    (write(folder, 2).path / missing).unlink()
    newest = folder.newest()
    assert newest is not None
    assert newest.standing.step == 1
    write(folder, 2)
    newest = folder.newest()
    assert newest is not None
    assert newest.standing.step == 2


def test_a_torn_note_is_no_checkpoint(folder: CheckpointFolder) -> None:
    """Half a note says nothing."""
    path = write(folder, 1).path / "checkpoint.json"
    path.write_text(path.read_text()[:20])
    assert folder.newest() is None


def test_the_last_ones_are_kept(folder: CheckpointFolder) -> None:
    """Older ones go, and what Ray Train and a killed start left when the next one begins."""
    for step in (1, 99_999_999, 100_000_000):
        write(folder, step)
    write(folder, 5).path.rename(folder.root / "step-200000000.tmp-1-aa")
    folder.keep_last(2)
    newest = folder.newest()
    assert newest is not None
    assert newest.standing.step == 100_000_000
    (folder.root / "progress.json.tmp-1-aa").touch()
    (folder.root / "checkpoint_manager_snapshot.json").write_text("{")
    folder.tell_progress(7)
    assert folder.progress() == 7
    folder.tell_failure("no number")
    assert folder.failure() == "no number"
    folder.prepare()
    assert folder.progress() is folder.failure() is None
    assert names(folder) == ["step-100000000", "step-99999999"]
    folder.clear()
    assert names(folder) == []


def test_another_training_is_told_by_what_differs(folder: CheckpointFolder) -> None:
    """The message has each key with both values, and what to do."""
    checkpoint = write(folder, 1)
    checkpoint.check_identity(IDENTITY)
    checkpoint.check_identity({"model": {"layers": 2}})  # before data are prepared
    with pytest.raises(TrainingError) as error:
        checkpoint.check_identity({"model": {"layers": 3}, "data": {"blend_xxh64": "aa"}})
    assert "model.layers was 2, now 3. Set train.resume=false" in str(error.value)
    assert "blend" not in str(error.value)


def test_a_user_finds_a_checkpoint_by_any_of_its_places(folder: CheckpointFolder) -> None:
    """An output directory, its folder of checkpoints, or one of them."""
    first, second = write(folder, 1), write(folder, 2)
    assert find_checkpoint(str(folder.root.parent)) == second
    assert find_checkpoint(str(folder.root)) == second
    assert find_checkpoint(str(first.path)) == first
    with pytest.raises(TrainingError, match=r"init_from=.*no checkpoint lies there; allowed"):
        find_checkpoint(str(folder.root / "nowhere"))
