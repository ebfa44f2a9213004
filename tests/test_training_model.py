"""The model learns from what it shall, and sees what it may: exactly that."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.training.batches import IGNORED, Batch, Pack, batch_of_packs

torch = pytest.importorskip("torch", reason="the lane for the newest cosmos-xenna has no torch")

from recipes.training.model import GPT, ModelShape, token_loss  # noqa: E402

SHAPE = ModelShape(vocabulary_size=40, layers=2, hidden_size=32, heads=2)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(SHAPE)
    for weight in model.parameters():  # at its beginning a model sees too little of anything
        torch.nn.init.normal_(weight, std=0.3)
    return model


def logits_of(model: GPT, batch: Batch) -> torch.Tensor:
    tensors = (batch.input_ids, batch.positions, batch.segments)
    return model(*(None if ids is None else torch.from_numpy(ids) for ids in tensors))


def pack(*conversations: list[int], masks: list[list[int]] | None = None) -> Pack:
    starts = np.cumsum([0, *(len(one) for one in conversations[:-1])])
    ids = np.concatenate(conversations)
    return Pack(ids, np.concatenate(masks) if masks else np.ones_like(ids), starts)


def test_a_token_sees_none_behind_it(model: GPT) -> None:
    """Another last token changes the logits of the last place alone."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    one, other = model(ids)
    assert torch.allclose(one[:4], other[:4], atol=1e-5)
    assert not torch.allclose(one[4], other[4])


def test_a_token_sees_those_before_it_and_where_they_are(model: GPT) -> None:
    """Another first token, or two tokens in another order, change the logits of the last place."""
    base, first, order = model(torch.tensor([[1, 2, 3, 4], [9, 2, 3, 4], [1, 3, 2, 4]]))
    assert not torch.allclose(base[3], first[3], atol=1e-3)
    assert not torch.allclose(base[3], order[3], atol=1e-3)


def test_a_conversation_does_not_see_its_neighbours(model: GPT) -> None:
    """Alone, before and behind others, and beside padding: its logits are the same."""
    own = [5, 6, 7, 8, 9]
    alone = logits_of(model, batch_of_packs([pack(own)]))[0]
    batch = batch_of_packs([pack([1, 2, 3], own, [4, 4]), pack(own, [3, 2, 1], [30] * 9)])
    packed = logits_of(model, batch)
    assert torch.allclose(packed[0, 3:7], alone, atol=1e-5)
    assert torch.allclose(packed[1, :4], alone, atol=1e-5)
    others = logits_of(model, batch_of_packs([pack([9, 9, 9], own, [4, 4])]))[0, 3:7]
    assert torch.allclose(others, packed[0, 3:7], atol=1e-5)
    assert torch.isfinite(packed).all()


def test_without_segments_it_would_see_them(model: GPT) -> None:
    """The neighbours do change the logits where nothing keeps them apart."""
    batch = batch_of_packs([pack([1, 2, 3], [5, 6, 7, 8])])
    apart = logits_of(model, batch)[0, 3:]
    together = logits_of(model, Batch(batch.input_ids, batch.targets, batch.tokens))[0, 3:]
    assert not torch.allclose(apart, together, atol=1e-3)


def test_what_is_masked_adds_nothing(model: GPT) -> None:
    """Loss and gradients are those of the wanted tokens; the masked ones may be any."""
    masks = [[0, 0, 1, 1], [0, 1, 0]]
    batch = batch_of_packs([pack([1, 2, 3, 4], [5, 6, 7], masks=masks)])
    logits = logits_of(model, batch).detach().requires_grad_()
    loss = token_loss(logits, torch.from_numpy(batch.targets))
    loss.backward()
    wanted = [1, 2, 4]  # places before tokens 3, 4 and 6
    by_hand = -torch.log_softmax(logits[0], dim=-1)[wanted, [3, 4, 6]].sum()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    touched = (logits.grad[0] != 0).any(dim=-1)
    assert touched.nonzero().flatten().tolist() == wanted


def test_nothing_wanted_is_no_loss_and_no_gradient(model: GPT) -> None:
    """A batch without a target gives 0 and gradients of 0, not NaN."""
    ids = torch.tensor([[1, 2, 3]])
    loss = token_loss(model(ids), torch.full((1, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert all((weight.grad == 0).all() for weight in model.parameters())


def test_it_learns() -> None:
    """A fixed text is known by heart after a few steps."""
    torch.manual_seed(1)
    model = GPT(SHAPE)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = token_loss(model(ids[:, :-1]), ids[:, 1:]) / 10
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(64), abs=0.3)  # a vocabulary of 40, filled up to 64
    assert losses[-1] < 0.05
