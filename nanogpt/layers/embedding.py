"""Token-level mixing before the first layer: smear, the signs of hashed bigrams, gates of heads and values.

All of it works on the flat stream of a micro-batch, across document boundaries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.layers.past import Past


def smear(
    e: Tensor,  # (T, D) token embeddings
    gate_weight: Tensor,  # (1, gate inputs)
    strength: Tensor,  # () smear_lambda
    past: Past | None = None,
) -> Tensor:
    """Add to each token a gated share of the previous (unsmeared) embedding; token 0 stays. Returns (T, D)."""
    if past is not None:
        return smear(past.joined("smear", e, 1), gate_weight, strength)[-len(e) :]
    gate = strength * torch.sigmoid(e[1:, : gate_weight.shape[1]] @ gate_weight.mT)
    return torch.cat((e[:1], e[1:] + gate * e[:-1]))


def bigram_sign(
    tokens: Tensor,  # (T,) integers
    signs: Tensor,  # (n, D), +1 and -1
    past: Past | None = None,
) -> Tensor:
    """The sign vector of each token and its predecessor, row `(tok[t-1] xor tok[t]) mod n`: (T, D).

    It distinguishes bigrams that share a row of the hashed table. Token 0 takes row 0.
    """
    if past is not None:
        return bigram_sign(past.joined("bigram signs", tokens, 1), signs)[-len(tokens) :]
    row = tokens[1:].bitwise_xor(tokens[:-1]) % signs.shape[0]
    return F.embedding(torch.cat((row.new_zeros(1), row)), signs)


def head_gate(
    u: Tensor,  # (T, D)
    weight: Tensor,  # (heads, gate inputs)
) -> Tensor:
    """One gate in (0, 1) for each token and head, read from the leading channels of `u`: (T, heads, 1)."""
    return torch.sigmoid(u[:, : weight.shape[1]] @ weight.mT).unsqueeze(-1)


def value_gate(
    u: Tensor,  # (T, D)
    value_embedding: Tensor,  # (T, D)
    weight: Tensor,  # (heads, gate inputs), an even number of them
) -> Tensor:
    """`head_gate` on the leading channels of both, each half of its inputs: (T, heads, 1)."""
    half = weight.shape[1] // 2
    return head_gate(torch.cat((u[:, :half], value_embedding[:, :half]), dim=1), weight)
