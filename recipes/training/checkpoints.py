"""Checkpoints of a training: each is whole or not there, and the newest is gone on from.

    checkpoints/
      step-00000100/         appears by one renaming, when all of it is on the disk
        model.pt             weights, by name
        optimizer.pt         AdamW's state
        tokenizer.json       what turns text into the model's tokens
        checkpoint.json      which step, what was trained, how it stands
      progress.json          how far the running training is, for the terminal
      failure.json           why all workers ended it, where starting them again would not help

Ray Train keeps files of its own in the same folder; nothing is gone on from by them, since they
are not written whole, and know nothing of a checkpoint that was not reported any more.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from recipes.errors import TrainingError
from recipes.stages.layout import replace_file, temporary_name, write_json

__all__ = ["Checkpoint", "CheckpointFolder", "Losses", "Standing", "write_flushed"]

_VERSION = 1
_NAME = "step-{:08d}"
_PATTERN = re.compile(r"step-(\d{8,})")
_NOTE = "checkpoint.json"

#: What Ray Train remembers of an earlier start; it refuses to begin if that is damaged.
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"

_PROGRESS, _FAILURE = "progress.json", "failure.json"


@dataclass(frozen=True)
class Losses:
    """Losses in nats per token: the last ones and the lowest so far; None while there are none."""

    last: float | None = None
    best: float | None = None
    validation: float | None = None
    best_validation: float | None = None


@dataclass(frozen=True)
class Standing:
    """How a training stands at a step.

    Attributes:
        step: steps done.
        tokens: tokens that all ranks have been shown.
        tokens_per_s: of all ranks together, at the last step.
    """

    step: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    losses: Losses = Losses()


@dataclass(frozen=True)
class _Note:
    """What ``checkpoint.json`` says."""

    identity: dict[str, Any]
    standing: Standing
    version: int = _VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole.

    Attributes:
        identity: what was trained: sections of what must be the same to go on from it.
        standing: how it stood.
    """

    path: Path
    identity: dict[str, Any]
    standing: Standing

    @property
    def model(self) -> Path:
        """The weights."""
        return self.path / "model.pt"

    @property
    def optimizer(self) -> Path:
        """The optimizer's state."""
        return self.path / "optimizer.pt"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the model was trained with."""
        return self.path / "tokenizer.json"

    def check_identity(self, wanted: dict[str, Any]) -> None:
        """Make sure that this is a checkpoint of the training that is wanted.

        Args:
            wanted: the identity, or those sections of it that are known yet.

        Raises:
            TrainingError: with every setting that differs, and both values.
        """
        own = {name: part for name, part in self.identity.items() if name in wanted}
        before, after = _flat(own), _flat(wanted)
        changed = [
            f"{key} was {before.get(key)}, now {after.get(key)}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        if changed:
            raise TrainingError(
                f"{self.path} is the checkpoint of another training: {'; '.join(changed)}. "
                "Set train.resume=false to train anew (its checkpoints are then removed), or "
                "another output_dir"
            )


@dataclass(frozen=True)
class CheckpointFolder:
    """All checkpoints of one training."""

    root: Path

    def newest(self) -> Checkpoint | None:
        """Return the whole checkpoint of the highest step."""
        for path in reversed(self._paths()):
            if (checkpoint := read_checkpoint(path)) is not None:
                return checkpoint
        return None

    def of_step(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step.

        Raises:
            TrainingError: This node does not see it.
        """
        checkpoint = read_checkpoint(path := self.root / _NAME.format(step))
        if checkpoint is None:
            raise TrainingError(
                f"a worker does not find {path}, which another one sees: output_dir must be a "
                "directory that every node sees under this path"
            )
        return checkpoint

    def write(
        self, identity: dict[str, Any], standing: Standing, fill: Callable[[Path], None]
    ) -> Checkpoint:
        """Write a checkpoint whole or not at all.

        Args:
            identity: what is trained.
            standing: how it stands.
            fill: puts the files of the model into a directory, flushed to the disk.

        Raises:
            OSError: It cannot be written.
        """
        path = self.root / _NAME.format(standing.step)
        temporary = temporary_name(path)
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            note = json.dumps(dataclasses.asdict(_Note(identity, standing)), indent=1)
            write_flushed(temporary / _NOTE, lambda file: file.write(note.encode()))
            if path.exists():  # one that is not whole: a whole one would have been gone on from
                shutil.rmtree(path)
            replace_file(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return Checkpoint(path, identity, standing)

    def keep_last(self, count: int) -> None:
        """Remove all but the newest ones."""
        for path in self._paths()[:-count]:
            shutil.rmtree(path, ignore_errors=True)

    def prepare(self) -> None:
        """Make the folder, without what a killed training left half-written.

        Raises:
            TrainingError: It cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for path in self.root.glob("*.tmp-*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for name in (_RAY_SNAPSHOT, _PROGRESS, _FAILURE):
                (self.root / name).unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.root} cannot be used: {error}") from error

    def clear(self) -> None:
        """Remove every checkpoint.

        Raises:
            TrainingError: One cannot be removed.
        """
        try:
            for path in self._paths():
                shutil.rmtree(path)
        except OSError as error:
            raise TrainingError(f"cannot remove a checkpoint: {error}") from error

    def _paths(self) -> list[Path]:
        """Return what has a checkpoint's name, the highest step last."""
        found = {
            int(match[1]): path
            for path in self.root.glob("step-*")
            if (match := _PATTERN.fullmatch(path.name))
        }
        return [found[step] for step in sorted(found)]

    def tell_progress(self, step: int) -> None:
        """Say how far the training is; nobody depends on it."""
        path = self.root / _PROGRESS
        temporary = temporary_name(path)
        temporary.write_text(json.dumps({"step": step}))
        os.replace(temporary, path)

    def progress(self) -> int | None:
        """Return the step that the training said last; None while it has said none."""
        try:
            return int(json.loads((self.root / _PROGRESS).read_bytes())["step"])
        except (FileNotFoundError, ValueError):
            return None

    def has_progress_since(self, moment_s: float) -> bool:
        """Say whether a training told of its progress after a moment, in unix seconds."""
        try:
            return (self.root / _PROGRESS).stat().st_mtime >= moment_s
        except FileNotFoundError:
            return False

    def tell_failure(self, reason: str) -> None:
        """Say why the training was ended by all of its workers.

        Raises:
            OSError: It cannot be written.
        """
        write_json(self.root / _FAILURE, {"reason": reason})

    def failure(self) -> str | None:
        """Return why the workers ended the training; None where they did not."""
        try:
            return str(json.loads((self.root / _FAILURE).read_bytes())["reason"])
        except FileNotFoundError:
            return None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint that lies here; None where there is none, or one that is not whole."""
    try:
        note = msgspec.json.decode((path / _NOTE).read_bytes(), type=_Note)
    except (OSError, msgspec.DecodeError):
        return None
    checkpoint = Checkpoint(path, note.identity, note.standing)
    whole = checkpoint.model.is_file() and checkpoint.optimizer.is_file()
    return checkpoint if whole and note.version == _VERSION else None


def find_checkpoint(where: str) -> Checkpoint:
    """Return the checkpoint that a user means: one by its path, or the newest of a recipe's output.

    Raises:
        TrainingError: There is none.
    """
    path = Path(where).expanduser().absolute()
    for folder in (path / "checkpoints", path):
        if (newest := CheckpointFolder(folder).newest()) is not None:
            return newest
    if (checkpoint := read_checkpoint(path)) is not None:
        return checkpoint
    raise TrainingError(
        f"train.init_from={where}: no checkpoint lies there; allowed: a recipe's output_dir, its "
        "folder checkpoints, or one of the checkpoints in it"
    )


def write_flushed(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
