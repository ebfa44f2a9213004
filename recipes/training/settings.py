"""The section ``train:`` of a recipe's YAML. Nothing here needs torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from recipes.errors import SettingsError
from recipes.settings import AtLeast, Count, Text, switched_off

__all__ = [
    "CheckpointSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PretrainTrainSettings",
    "TrainSettings",
    "ValidationSettings",
    "is_training_wanted",
]

#: What training needs beside the recipe itself; all of it comes with ``raywb[train]``.
_PACKAGES = ("torch", "pandas", "pyarrow", "pydantic", "fsspec", "requests")


@dataclass(frozen=True)
class Within:
    """A number must lie between these two."""

    lowest: float
    highest: float

    def allows(self, value: Any) -> bool:
        """Say whether the value may be used."""
        return bool(self.lowest <= value <= self.highest)

    def __str__(self) -> str:
        return f"from {self.lowest:g} to {self.highest:g}"


@dataclass(frozen=True)
class Above:
    """A number must be higher than this."""

    limit: float

    def allows(self, value: Any) -> bool:
        """Say whether the value may be used."""
        return bool(value > self.limit)

    def __str__(self) -> str:
        return f"above {self.limit:g}"


@dataclass(frozen=True)
class Bits:
    """A whole number must fit this many bits; it is not below 0."""

    count: int

    def allows(self, value: Any) -> bool:
        """Say whether the value may be used."""
        return bool(0 <= value < 2**self.count)

    def __str__(self) -> str:
        return f"from 0 to 2**{self.count} - 1"


Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, Within(0, float("inf"))]
WholeNumber = Annotated[int, AtLeast(0)]
#: What torch, and the order of the samples, take.
Seed = Annotated[int, Bits(63)]


@dataclass(frozen=True)
class ModelSettings:
    """The size of the GPT; its vocabulary is that of the tokenizer in the output directory."""

    layers: Count
    hidden_size: Count
    heads: Count


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, with a learning rate that rises in a line and falls in half a cosine."""

    learning_rate: Positive
    min_learning_rate: NotNegative
    warmup_steps: WholeNumber
    weight_decay: NotNegative
    clip_grad_norm: Positive | None


@dataclass(frozen=True)
class ValidationSettings:
    """How often, and on how much."""

    every_steps: Count | None
    batches: Count


@dataclass(frozen=True)
class CheckpointSettings:
    """How often, how many are kept, and which of them W&B gets as artifacts."""

    every_steps: Count
    keep_last: Count
    artifacts: Literal["every", "best", "last", "none"]


@dataclass(frozen=True)
class TrainSettings:
    """What both recipes' trainings have in common."""

    enabled: bool | None
    resume: bool
    init_from: Text | None
    seed: Seed
    workers: Count | None
    cpus_per_worker: Count
    use_gpu: bool | None
    precision: Literal["auto", "bf16", "fp32"]
    max_failures: WholeNumber
    steps: Count
    batch_size: Count
    model: ModelSettings
    optimizer: OptimizerSettings
    validation: ValidationSettings
    checkpoints: CheckpointSettings

    def check(self) -> None:
        """Refuse what does not fit together.

        Raises:
            SettingsError: with the keys that do not fit, and both values.
        """
        model = self.model
        if model.hidden_size % (2 * model.heads):
            raise SettingsError(
                f"train.model.hidden_size={model.hidden_size} must be a multiple of twice "
                f"train.model.heads={model.heads}: each head turns pairs of values by position"
            )
        optimizer = self.optimizer
        if optimizer.min_learning_rate > optimizer.learning_rate:
            raise SettingsError(
                f"train.optimizer.min_learning_rate={optimizer.min_learning_rate} is higher than "
                f"train.optimizer.learning_rate={optimizer.learning_rate}: the rate falls from "
                "this one to that one"
            )
        if optimizer.warmup_steps >= self.steps:
            raise SettingsError(
                f"train.optimizer.warmup_steps={optimizer.warmup_steps} must be fewer than "
                f"train.steps={self.steps}: the rate would never stop rising"
            )
        if self.checkpoints.artifacts == "best" and self.validation.every_steps is None:
            raise SettingsError(
                "train.checkpoints.artifacts=best needs validation, which "
                "train.validation.every_steps=null turns off"
            )
        if self.workers is not None:
            self.check_workers(self.workers)

    def idle_keys(self) -> dict[str, str]:
        """Return the keys that change nothing beside another, each with the other one."""
        if self.enabled is False:
            return switched_off("train", self)
        if self.validation.every_steps is None:
            return {"train.validation.batches": "train.validation.every_steps"}
        return {}

    def check_workers(self, workers: int) -> None:
        """Refuse a number of workers that cannot share a batch evenly."""
        if self.batch_size % workers:
            raise SettingsError(
                f"train.batch_size={self.batch_size} must be a multiple of the number of workers, "
                f"which is {workers}: it is the batch of all workers together"
            )


@dataclass(frozen=True)
class PretrainTrainSettings(TrainSettings):
    """What pretraining has besides: how the stream of tokens is cut."""

    context_tokens: Count
    validation_share: Annotated[float, Within(0, 0.5)]


def is_training_wanted(settings: TrainSettings, announce: Callable[[str], None]) -> bool:
    """Say whether this start trains; called at its beginning, before data are prepared.

    Args:
        settings: the section ``train:``.
        announce: is told in one sentence why training is left out though nobody forbade it.

    Raises:
        SettingsError: settings do not fit together, or training is asked for by name and what it
            needs is not installed.
    """
    if settings.enabled is False:
        return False
    settings.check()
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return True
    names = ", ".join(missing)
    if settings.enabled:
        raise SettingsError(
            f"train.enabled=true needs {names}, which cannot be imported here; "
            "install it with: pip install 'raywb[train]'"
        )
    announce(
        f"Training is left out, because {names} cannot be imported here; "
        "install it with: pip install 'raywb[train]'"
    )
    return False
