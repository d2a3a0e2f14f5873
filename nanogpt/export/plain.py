"""Kernels for exported code: plain equivalents, without backends or this package's operations."""

from __future__ import annotations

from torch import Tensor

from nanogpt.kernels.attention_plain import attention_dense, first_visible_key
from nanogpt.kernels.head_mixing import _plain_forward


def attention(
    q: Tensor,  # (T, H, D)
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    window: int,
    scale: float,
    backend: str,
) -> Tensor:
    """Causal attention inside documents over a window in tokens: (T, H, D). O(T^2) memory."""
    return attention_dense(q, k, v, cu_seqlens, window=window, scale=scale).contiguous()


def mix_heads(
    y: Tensor,  # (T, H, D) attention's output
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,  # (T, H)
    w2: Tensor,
    cu_seqlens: Tensor,
    *,
    window: int,
    scale: float,
    plain: bool,
) -> Tensor:
    """`y` plus the mixture of heads over a short window, (T, H, D)."""
    first = first_visible_key(cu_seqlens, q.shape[0], window - 1)
    correction = _plain_forward(q, k, v, w1, w2, first, window, scale)[0]
    return (y.to(correction.dtype) + correction).to(y.dtype)
