"""Token-level mixing before the first layer: smear, hashed bigrams, value-embedding gates.

All of it runs over the flat stream of a micro-batch, across document boundaries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smear(
    e: Tensor,  # (T, D) token embeddings
    gate_weight: Tensor,  # (1, gate inputs)
    strength: Tensor,  # () smear_lambda
) -> Tensor:
    """Add to each token a gated share of the embedding before it (the unsmeared one); token 0 stays. Returns (T, D)."""
    gate = strength * torch.sigmoid(e[1:, : gate_weight.shape[1]] @ gate_weight.mT)
    return torch.cat((e[:1], e[1:] + gate * e[:-1]))


def bigram_hash(
    tokens: Tensor,  # (T,) integers
    rows: int,
    multipliers: tuple[int, int],
) -> Tensor:
    """Row of the bigram table for each token and the one before it: (T,) int64.

    `((m0 * tok[t]) xor (m1 * tok[t-1])) mod (rows - 1)`; the last row is kept for token 0, which has none before it.
    """
    wide = tokens.to(torch.int64)
    mixed = (multipliers[0] * wide[1:]).bitwise_xor(multipliers[1] * wide[:-1]) % (rows - 1)
    return torch.cat((wide.new_full((1,), rows - 1), mixed))


def head_gate(
    u: Tensor,  # (T, D)
    weight: Tensor,  # (heads, gate inputs)
) -> Tensor:
    """One gate in (0, 1) for each token and head, read from the leading channels of `u`: (T, heads, 1)."""
    return torch.sigmoid(u[:, : weight.shape[1]] @ weight.mT).unsqueeze(-1)
