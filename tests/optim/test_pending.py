"""Gradients that a checkpoint keeps by rank: every bit of them, on as many ranks or another number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanogpt.optim.communication import Communicator, RankOf
from nanogpt.optim.pending import gather_pending, pending_gradient

SHAPES = ((), (3,), (5, 4), (2, 3, 4), (4, 5))


def gradient(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """With rows of zeros, of which some have a -0.0 in them; the last one is transposed in memory."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if made.ndim > 1:
        made.view(-1, shape[-1])[:3] = 0
        made.view(-1, shape[-1])[1, 0] = -0.0
    return made.mT.contiguous().mT if shape == SHAPES[-1] else made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_kept(dtype: torch.dtype) -> None:
    gradients = {str(shape): gradient(shape, dtype, 0) for shape in SHAPES}
    (kept,) = pending = gather_pending(Communicator(), gradients)
    assert kept is not None
    assert len(kept["(5, 4)"]["rows"]) == 3  # the -0.0's row and the two that are not zeros
    for label, expected in gradients.items():
        found = pending_gradient([kept], label, Communicator())
        assert found is not None and found.dtype == dtype and found.shape == expected.shape
        assert torch.equal(found.signbit(), expected.signbit()) and torch.equal(found, expected)
    assert pending_gradient([kept], "another", Communicator()) is None
    assert pending_gradient([], "(5, 4)", Communicator()) is None
    assert len(pending) == 1


def test_another_number_of_ranks_has_the_mean() -> None:
    ranks = [gather_pending(Communicator(), {"w": gradient((5, 4), torch.float32, seed)})[0] for seed in (0, 1)]
    pending = [kept for kept in ranks if kept is not None]
    first, second = (gradient((5, 4), torch.float32, seed) for seed in (0, 1))
    for size in (1, 4):
        found = pending_gradient(pending, "w", RankOf(size))
        assert found is not None and torch.equal(found, (first + second) / 2)
    found = pending_gradient(pending, "w", RankOf(2))
    assert found is not None and torch.equal(found, first)


def test_nothing_pending_is_nothing_kept() -> None:
    assert gather_pending(Communicator(), {}) == []
