"""What a training worker logs: its rows, as one rank of its stage, through raywb.

    training/<recipe>/    loss, learning_rate, grad_norm, tokens_per_s, step_time_s  by step
    validation/<recipe>/  loss, perplexity, tokens                                   by step

Rows of all ranks at one step become one. Both stages' summaries tell the last and the best loss.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.training.checkpoints import Losses

if TYPE_CHECKING:
    import raywb

__all__ = ["WorkerLog", "worker_log"]

#: How the values of several ranks become one, where that is not their mean.
_ACROSS_RANKS = {"tokens_per_s": "sum", "step_time_s": "max", "tokens": "sum"}

#: Above this, e to the power of a loss is no number any more.
_LARGEST_LOSS = 700.0


class WorkerLog:
    """One rank's way into the W&B run; without clients, the same and nothing happens."""

    def __init__(
        self, recipe: str, training: raywb.Client | None, validation: raywb.Client | None
    ) -> None:
        self._recipe = recipe
        self._training = training
        self._validation = validation

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Log a training step."""
        if self._training is not None:
            self._training.log(dict(values), step=step)

    def validation(self, loss: float, tokens: int, step: int) -> None:
        """Log a validation: the loss of all ranks, and how many tokens this one's share had."""
        if self._validation is not None:
            perplexity = math.exp(loss) if loss < _LARGEST_LOSS else math.inf
            self._validation.log(
                {"loss": loss, "perplexity": perplexity, "tokens": tokens}, step=step
            )

    def config(self, values: Mapping[str, Any]) -> None:
        """Note what is trained, and on what."""
        if self._training is not None:
            self._training.config.update({f"training/{self._recipe}": dict(values)})

    def losses(self, losses: Losses) -> None:
        """Note how it stands in the run's summary."""
        if self._training is not None and self._validation is not None:
            self._training.summary.update(_present(last_loss=losses.last, best_loss=losses.best))
            self._validation.summary.update(
                _present(last_loss=losses.validation, best_loss=losses.best_validation)
            )

    def checkpoint(self, path: Path) -> None:
        """Register a checkpoint as a new version of the run's artifact."""
        if self._training is not None:
            name = f"{self._recipe}-checkpoint-{self._training.run.id}"
            self._training.log_artifact(path, name, "model")


def _present(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


@contextlib.contextmanager
def worker_log(recipe: str, rank: int, world_size: int, *, tracked: bool) -> Iterator[WorkerLog]:
    """Attach to the cluster's run as one rank, until the block is left.

    Args:
        recipe: ``pretrain`` or ``sft``.
        rank: this worker's.
        world_size: how many there are.
        tracked: whether there is a run; without one, nothing is logged.
    """
    if not tracked:
        yield WorkerLog(recipe, None, None)
        return
    import raywb

    with (
        raywb.attach(f"training/{recipe}", rank=rank, world_size=world_size) as training,
        raywb.attach(f"validation/{recipe}", rank=rank, world_size=world_size) as validation,
    ):
        for client in (training, validation):
            for name, kind in _ACROSS_RANKS.items():
                client.define_metric(name, across_ranks=kind)
        yield WorkerLog(recipe, training, validation)
