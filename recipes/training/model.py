"""A small GPT: RMSNorm before each part, rotary positions, SwiGLU, tied embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from recipes.training.batches import IGNORED

__all__ = ["GPT", "ModelShape", "token_loss"]

#: The vocabulary is filled up to a multiple of this, which suits matrix units.
_VOCABULARY_STEP = 64
#: Slowest rotation of a pair of values, as a wavelength in tokens.
_LONGEST_WAVE = 10_000.0
_INITIAL_DEVIATION = 0.02


@dataclass(frozen=True)
class ModelShape:
    """What decides which weights a model has."""

    vocabulary_size: int
    layers: int
    hidden_size: int
    heads: int

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocabulary_size / _VOCABULARY_STEP) * _VOCABULARY_STEP


class GPT(nn.Module):  # type: ignore[misc]
    """Says for each token of each sample which one may follow."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.rows, shape.hidden_size)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=_INITIAL_DEVIATION)
        for block in self.blocks:
            # What is added 2·layers times shall not grow with the depth.
            for linear in (block.attention_out, block.mlp_out):
                nn.init.normal_(linear.weight, std=_INITIAL_DEVIATION / math.sqrt(2 * shape.layers))

    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Return logits of shape (samples, tokens, vocabulary).

        Args:
            input_ids: token ids of shape (samples, tokens).
            positions: where each token is in its conversation; None: in its sample.
            segments: no token looks at one of another segment; None: each sample is one.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = None
        if segments is not None:
            count = input_ids.shape[1]
            causal = torch.ones(count, count, dtype=torch.bool, device=input_ids.device).tril()
            mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
        hidden = self.embedding(input_ids)
        turn = self.blocks[0].rotation(positions)
        for block in self.blocks:
            hidden = block(hidden, turn, mask)
        return functional.linear(self.norm(hidden), self.embedding.weight)


class _Block(nn.Module):  # type: ignore[misc]
    """Attention, then a gated feed-forward network, each added to what went in."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.heads = shape.heads
        self.head_size = size // shape.heads
        inner = math.ceil(size * 8 / 3 / 8) * 8
        self.attention_norm = nn.RMSNorm(size)
        self.attention_in = nn.Linear(size, 3 * size, bias=False)
        self.attention_out = nn.Linear(size, size, bias=False)
        self.mlp_norm = nn.RMSNorm(size)
        self.mlp_in = nn.Linear(size, 2 * inner, bias=False)
        self.mlp_out = nn.Linear(inner, size, bias=False)

    def forward(self, hidden: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        samples, tokens, size = hidden.shape
        parts = self.attention_in(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (
            part.view(samples, tokens, self.heads, self.head_size).transpose(1, 2) for part in parts
        )
        found = functional.scaled_dot_product_attention(
            _rotated(query, turn), _rotated(key, turn), value, mask, is_causal=mask is None
        )
        hidden = hidden + self.attention_out(found.transpose(1, 2).reshape(samples, tokens, size))
        gate, inner = self.mlp_in(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.mlp_out(functional.silu(gate) * inner)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine by which pairs of values are turned, for all heads."""
        pairs = torch.arange(self.head_size // 2, device=positions.device)
        angles = positions[:, None, :, None] * _LONGEST_WAVE ** (-2 * pairs / self.head_size)
        return angles.cos(), angles.sin()


def _rotated(values: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = turn
    first, second = values.float().chunk(2, dim=-1)
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.cat(turned, dim=-1).to(values.dtype)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross entropies of all tokens that are to be predicted.

    What is not to be predicted adds nothing, neither to the loss nor to any gradient.
    """
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
