"""Attention of the record models: QK-norm, rotary, key shift, and heads that are joined in pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from nanogpt.kernels.attention import attention
from nanogpt.layers.norm import norm
from nanogpt.layers.rotary import Rotary, shift_still_keys

XSA_FLOOR = 1e-8


def rotated_queries_keys(
    q: Tensor,  # (T, H, head_dim)
    k: Tensor,  # (T, H, head_dim)
    rotary: Rotary,
    *,
    paired: bool,
    shifted: bool,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as attention takes them: normalised by head, rotated, the keys shifted where asked for."""
    q, k = rotary(norm(q), paired=paired), rotary(norm(k), paired=paired)
    if shifted:
        k = shift_still_keys(k, rotary.rotated)
    return q, k


def head_attention(
    q: Tensor,  # (T, H, dq)
    k: Tensor,  # (T, H, dq)
    v: Tensor,  # (T, H, dv)
    cu_seqlens: Tensor,  # (n,) int32
    max_seqlen: int,
    *,
    window: int | Tensor,
    scale: float | Tensor,
    paired: bool,
    backend: str,
) -> Tensor:
    """Causal attention inside documents over a window in tokens, (T, H, dv).

    Paired: row 2t holds the first half of token t's heads, row 2t + 1 the second half, a sequence twice as long. The
    window keeps its number and so reaches half as many tokens.
    """
    shape = count, heads, _ = v.shape
    if paired:
        q, k, v = (x.reshape(2 * count, heads // 2, x.shape[2]) for x in (q, k, v))
        cu_seqlens, max_seqlen = 2 * cu_seqlens, 2 * max_seqlen
    y = attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, window=window, scale=scale, backend=backend)
    return y.view(shape)


def remove_own_value(
    y: Tensor,  # (T, H, head_dim), attention's output
    v: Tensor,  # the same shape: each token's own values
    strength: Tensor,  # (T, H)
) -> Tensor:
    """Take away from each head's output tanh(strength) of its part along the token's own value (XSA)."""
    wide_y, wide_v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (y, v))
    along = (wide_y * wide_v).sum(-1, keepdim=True) / wide_v.square().sum(-1, keepdim=True).clamp(min=XSA_FLOOR)
    share = torch.tanh(strength).unsqueeze(-1)
    return (wide_y - share * along * wide_v).to(y.dtype)
