"""Beginning with the weights of an earlier training, whose vocabulary may have grown since."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from recipes.errors import TrainingError
from recipes.training.checkpoints import Checkpoint
from recipes.training.model import GPT

__all__ = ["load_initial_weights"]


def load_initial_weights(model: GPT, initial: Checkpoint, tokenizer: Path) -> None:
    """Take over the weights of a checkpoint; tokens that it does not know keep their new ones.

    Args:
        model: on the CPU.
        initial: the checkpoint.
        tokenizer: the tokenizer of the data, which may have tokens more than the checkpoint's.

    Raises:
        TrainingError: The model has another shape, or a token another id.
    """
    known = _vocabulary(initial.tokenizer)
    vocabulary = _vocabulary(tokenizer)
    moved = [token for token, number in known.items() if vocabulary.get(token) != number]
    if moved:
        raise TrainingError(
            f"{initial.path} was trained with another tokenizer: {len(moved):,} of its "
            f"{len(known):,} tokens have other ids now, for example {moved[0]!r}. Prepare the data "
            f"with tokenizer.source={initial.tokenizer}"
        )
    weights = torch.load(initial.model, map_location="cpu", weights_only=True)
    rows = max(known.values()) + 1
    own = model.state_dict()
    embedding = "embedding.weight"
    if embedding in weights and weights[embedding].shape[1:] == own[embedding].shape[1:]:
        weights[embedding] = torch.cat([weights[embedding][:rows], own[embedding][rows:]])
    differing = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if differing:
        shape = initial.identity.get("model")
        raise TrainingError(
            f"{initial.path} holds a model of another shape: set train.model to {shape} "
            f"({differing[0]} and {len(differing) - 1} more do not fit)"
        )
    model.load_state_dict(weights)


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    return vocabulary
