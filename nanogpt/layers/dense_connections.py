"""MUDD: small nets that compute, for each token, the weights of connections between layers and the gates of heads.

After "MUDDFormer" (Xiao et al., 2025): a layer reads a weighted sum of earlier activations, with weights that
depend on the token. Numbers come out in columns; the caller knows what each is for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_numbers(
    x: Tensor,  # (T, D)
    w1: Tensor,  # (hidden, D)
    w2: Tensor,  # (columns, hidden)
    bias: Tensor,  # (columns,)
    scale: Tensor | float,  # () or a constant
) -> Tensor:
    """`scale * (w2 gelu(w1 x) + bias)`, with the exact gelu: (T, columns) in x's dtype."""
    return scale * (F.gelu(x @ w1.mT) @ w2.mT + bias)


def for_every_token(numbers: Tensor, tokens: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Each of `numbers` (m, n) in `dtype` as a weight shared by all tokens, (tokens, 1), by row and column.

    They are expanded before they are split, so that their gradients are summed over tokens together: separately, each
    sum is a kernel of one block, 2 to 4 us on an H100.
    """
    weights = numbers.flatten()[:, None, None].expand(-1, tokens, 1).unbind()
    columns = numbers.shape[1]
    return [[w.to(dtype) for w in weights[i : i + columns]] for i in range(0, len(weights), columns)]


def weighted_sum(weights: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> Tensor:
    """The sum of (T, D) parts, each with its weight (T, 1)."""
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * part
    return total
