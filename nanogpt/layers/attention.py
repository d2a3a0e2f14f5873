"""Attention of the record models: QK-norm, rotary, key shift, and heads joined in pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from nanogpt.kernels.attention import attention
from nanogpt.kernels.head_mixing import mix_heads
from nanogpt.layers.norm import norm
from nanogpt.layers.past import Past
from nanogpt.layers.rotary import Rotary, shift_still_keys

XSA_FLOOR = 1e-8


def rotated_queries_keys(
    q: Tensor,  # (T, H, head_dim)
    k: Tensor,  # (T, H, head_dim)
    rotary: Rotary,
    *,
    paired: bool,
    shifted: bool,
    layer: int = 0,
    past: Past | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys for attention: normalised per head, rotated, and the keys shifted if requested."""
    first = 0 if past is None else past.length
    q, k = rotary(norm(q), paired=paired, first=first), rotary(norm(k), paired=paired, first=first)
    if shifted and past is not None:
        k = shift_still_keys(past.joined(("unshifted key", layer), k, 1), rotary.rotated)[-len(k) :]
    elif shifted:
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
    layer: int = 0,
    past: Past | None = None,
) -> Tensor:
    """Causal attention inside documents over a window in tokens, (T, H, dv).

    Paired: row 2t holds the first half of token t's heads, row 2t + 1 the second half, a sequence twice as long. The
    window keeps its number, and so reaches half as many tokens.
    """
    if past is not None:
        y = past.attention(layer, q, k, v, window=window, scale=scale, paired=paired)
        if y is not None:
            return y
    shape = count, heads, _ = v.shape
    if paired:
        q, k, v = (x.reshape(2 * count, heads // 2, x.shape[2]) for x in (q, k, v))
        cu_seqlens, max_seqlen = 2 * cu_seqlens, 2 * max_seqlen
    y = attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, window=window, scale=scale, backend=backend)
    return y.view(shape)


def mix_new_heads(
    y: Tensor,  # (T, H, D) attention's output
    q: Tensor,  # (T, H, D)
    w1: Tensor,  # (T, H)
    w2: Tensor,
    past: Past,
    layer: int,
    *,
    window: int,
    scale: float | Tensor,
    plain: bool,
) -> Tensor:
    """`mix_heads` for tokens whose keys and values are in the past, along with those of earlier tokens."""
    count = len(y)
    k, v, bounds = past.recent(layer, window - 1 + count)
    before = len(k) - count
    y, q, w1, w2 = (torch.cat((x.new_zeros(before, *x.shape[1:]), x)) for x in (y, q, w1, w2))
    return mix_heads(y, q, k, v, w1, w2, bounds, window=window, scale=scale, plain=plain)[before:]


def remove_own_value(
    y: Tensor,  # (T, H, head_dim), attention's output
    v: Tensor,  # the same shape: each token's own values
    strength: Tensor,  # (T, H)
) -> Tensor:
    """Subtract from each head's output tanh(strength) of its component along the token's own value (XSA)."""
    wide_y, wide_v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (y, v))
    along = (wide_y * wide_v).sum(-1, keepdim=True) / wide_v.square().sum(-1, keepdim=True).clamp(min=XSA_FLOOR)
    share = torch.tanh(strength).unsqueeze(-1)
    return (wide_y - share * along * wide_v).to(y.dtype)
