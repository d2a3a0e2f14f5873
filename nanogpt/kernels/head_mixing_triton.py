"""Triton kernels of the DC correction; see `nanogpt.kernels.head_mixing` for the formulas.

Forward, and the gradients of q, w1 and w2: a program takes `block` queries and the `reach` keys up to the last
of them, which is all that the window can reach, so there is no loop over keys. The gradients of k and v: a program
takes `block` keys and the `reach` queries that begin with the first of them, and computes the weights again. So every
gradient has one writer, nothing is added atomically, and the result is the same every time.

Each kernel goes over the heads twice, since the mixture needs all of them before any can use it. Programs read
the tensors `reach / block` times from L2, which is what they wait for: blocks are as large as registers allow.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HIDDEN_SCORE = tl.constexpr(-1e30)


@triton.jit
def _tile(ptr, rows, inside, head, H: tl.constexpr, D: tl.constexpr):
    """One head's rows of a (T, H, D) tensor, zeros where not `inside`."""
    place = (rows[:, None] * H + head) * D + tl.arange(0, D)[None, :]
    return tl.load(ptr + place, mask=inside[:, None], other=0.0)


@triton.jit
def _numbers(ptr, rows, inside, head, H: tl.constexpr):
    """One head's rows of a (T, H) tensor in fp32."""
    return tl.load(ptr + rows * H + head, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scores(q, k, visible, scale):
    return tl.where(visible, tl.dot(q, k.T, input_precision="ieee") * scale, HIDDEN_SCORE)


@triton.jit
def _mix_heads_kernel(
    q_ptr,  # (T, H, D), like k, v and out
    k_ptr,
    v_ptr,
    w1_ptr,  # (T, H), like w2 and lse
    w2_ptr,
    first_ptr,  # (T,) int32
    out_ptr,  # fp32
    lse_ptr,  # fp32
    T,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    query = start + tl.arange(0, BLOCK)
    key = start + BLOCK - REACH + tl.arange(0, REACH)
    in_q, in_k = query < T, (key >= 0) & (key > start - WINDOW) & (key < T)
    first = tl.load(first_ptr + query, mask=in_q, other=0)
    visible = (key[None, :] >= first[:, None]) & (key[None, :] <= query[:, None])

    mixture = tl.zeros((BLOCK, REACH), tl.float32)
    for h in range(H):
        scores = _scores(_tile(q_ptr, query, in_q, h, H, D), _tile(k_ptr, key, in_k, h, H, D), visible, scale)
        top = tl.max(scores, axis=1)
        p = tl.exp(scores - top[:, None])
        total = tl.sum(p, axis=1)
        tl.store(lse_ptr + query * H + h, top + tl.log(total), mask=in_q)
        mixture += (_numbers(w1_ptr, query, in_q, h, H) / total)[:, None] * p
    for h in range(H):
        v = _tile(v_ptr, key, in_k, h, H, D)
        weights = (_numbers(w2_ptr, query, in_q, h, H)[:, None] * mixture).to(v.dtype)
        place = (query[:, None] * H + h) * D + tl.arange(0, D)[None, :]
        tl.store(out_ptr + place, tl.dot(weights, v, input_precision="ieee"), mask=in_q[:, None])


@triton.jit
def _mix_heads_query_gradients_kernel(
    grad_ptr,  # (T, H, D)
    q_ptr,
    k_ptr,
    v_ptr,
    w1_ptr,
    w2_ptr,
    first_ptr,
    lse_ptr,
    dq_ptr,
    dw1_ptr,  # (T, H) fp32, like dw2
    dw2_ptr,
    T,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    query = start + tl.arange(0, BLOCK)
    key = start + BLOCK - REACH + tl.arange(0, REACH)
    in_q, in_k = query < T, (key >= 0) & (key > start - WINDOW) & (key < T)
    first = tl.load(first_ptr + query, mask=in_q, other=0)
    visible = (key[None, :] >= first[:, None]) & (key[None, :] <= query[:, None]) & in_q[:, None]

    mixture = tl.zeros((BLOCK, REACH), tl.float32)
    d_mixture = tl.zeros((BLOCK, REACH), tl.float32)
    for h in range(H):
        k = _tile(k_ptr, key, in_k, h, H, D)
        scores = _scores(_tile(q_ptr, query, in_q, h, H, D), k, visible, scale)
        p = tl.exp(scores - _numbers(lse_ptr, query, in_q, h, H)[:, None])
        mixture += _numbers(w1_ptr, query, in_q, h, H)[:, None] * p
        grad = _tile(grad_ptr, query, in_q, h, H, D)
        d_weights = tl.dot(grad, _tile(v_ptr, key, in_k, h, H, D).T, input_precision="ieee")
        d_mixture += _numbers(w2_ptr, query, in_q, h, H)[:, None] * d_weights
        # The mixture is not whole yet: dw2 below.
    for h in range(H):
        k = _tile(k_ptr, key, in_k, h, H, D)
        grad = _tile(grad_ptr, query, in_q, h, H, D)
        d_weights = tl.dot(grad, _tile(v_ptr, key, in_k, h, H, D).T, input_precision="ieee")
        tl.store(dw2_ptr + query * H + h, tl.sum(mixture * d_weights, axis=1), mask=in_q)
        scores = _scores(_tile(q_ptr, query, in_q, h, H, D), k, visible, scale)
        p = tl.exp(scores - _numbers(lse_ptr, query, in_q, h, H)[:, None])
        dw1 = tl.sum(p * d_mixture, axis=1)
        tl.store(dw1_ptr + query * H + h, dw1, mask=in_q)
        d_scores = p * _numbers(w1_ptr, query, in_q, h, H)[:, None] * (d_mixture - dw1[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, input_precision="ieee") * scale
        place = (query[:, None] * H + h) * D + tl.arange(0, D)[None, :]
        tl.store(dq_ptr + place, dq.to(k.dtype), mask=in_q[:, None])


@triton.jit
def _mix_heads_key_gradients_kernel(
    grad_ptr,  # (T, H, D)
    q_ptr,
    k_ptr,
    v_ptr,
    w1_ptr,
    w2_ptr,
    first_ptr,
    lse_ptr,
    dw1_ptr,  # (T, H) fp32, from the kernel above
    dk_ptr,
    dv_ptr,
    T,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,
):
    # Keys by queries throughout, unlike above, so that nothing is transposed between two products.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    key = start + tl.arange(0, BLOCK)
    query = start + tl.arange(0, REACH)
    in_k, in_q = key < T, (query < T) & (query < start + BLOCK + WINDOW)
    first = tl.load(first_ptr + query, mask=in_q, other=0)
    visible = (key[:, None] >= first[None, :]) & (key[:, None] <= query[None, :]) & in_q[None, :]

    mixture = tl.zeros((BLOCK, REACH), tl.float32)
    d_mixture = tl.zeros((BLOCK, REACH), tl.float32)
    for h in range(H):
        q = _tile(q_ptr, query, in_q, h, H, D)
        scores = _scores(_tile(k_ptr, key, in_k, h, H, D), q, visible, scale)
        p = tl.exp(scores - _numbers(lse_ptr, query, in_q, h, H)[None, :])
        mixture += _numbers(w1_ptr, query, in_q, h, H)[None, :] * p
        grad = _tile(grad_ptr, query, in_q, h, H, D)
        d_weights = tl.dot(_tile(v_ptr, key, in_k, h, H, D), grad.T, input_precision="ieee")
        d_mixture += _numbers(w2_ptr, query, in_q, h, H)[None, :] * d_weights
    for h in range(H):
        place = (key[:, None] * H + h) * D + tl.arange(0, D)[None, :]
        grad = _tile(grad_ptr, query, in_q, h, H, D)
        weights = (_numbers(w2_ptr, query, in_q, h, H)[None, :] * mixture).to(grad.dtype)
        dv = tl.dot(weights, grad, input_precision="ieee")
        tl.store(dv_ptr + place, dv.to(grad.dtype), mask=in_k[:, None])
        q = _tile(q_ptr, query, in_q, h, H, D)
        scores = _scores(_tile(k_ptr, key, in_k, h, H, D), q, visible, scale)
        p = tl.exp(scores - _numbers(lse_ptr, query, in_q, h, H)[None, :])
        rest = d_mixture - _numbers(dw1_ptr, query, in_q, h, H)[None, :]
        d_scores = p * _numbers(w1_ptr, query, in_q, h, H)[None, :] * rest
        dk = tl.dot(d_scores.to(q.dtype), q, input_precision="ieee") * scale
        tl.store(dk_ptr + place, dk.to(q.dtype), mask=in_k[:, None])


class Config(NamedTuple):
    """`block` queries (or keys) of a program, and the `reach` keys (or queries) that they see: a power of two."""

    block: int
    reach: int
    warps: int
    stages: int


FORWARD = Config(16, 128, 4, 3)
QUERY_GRADIENTS = Config(16, 128, 4, 2)
KEY_GRADIENTS = Config(16, 128, 8, 2)


def _launch(kernel, config: Config, window: int, q: Tensor, *arguments: Tensor, scale: float) -> None:
    tokens, heads, head_dim = q.shape
    if config.reach < window + config.block - 1:
        raise ValueError(f"a window of {window} tokens: the kernel reaches {config.reach - config.block + 1}")
    kernel[(triton.cdiv(tokens, config.block),)](
        *arguments,
        tokens,
        scale,
        H=heads,
        D=head_dim,
        WINDOW=window,
        BLOCK=config.block,
        REACH=config.reach,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, first: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The correction (T, H, D) and the scores' logsumexp (T, H), fp32; all inputs contiguous."""
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _launch(_mix_heads_kernel, FORWARD, window, q, q, k, v, w1, w2, first, out, lse, scale=scale)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor,
    first: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, w1, w2 in their dtypes."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dw1, dw2 = (torch.empty_like(lse) for _ in range(2))
    inputs = (
        grad.to(q.dtype),
        q,
        k,
        v,
        w1,
        w2,
        first,
        lse,
    )  # rounded once here instead of by every program that reads it
    _launch(_mix_heads_query_gradients_kernel, QUERY_GRADIENTS, window, q, *inputs, dq, dw1, dw2, scale=scale)
    _launch(_mix_heads_key_gradients_kernel, KEY_GRADIENTS, window, q, *inputs, dw1, dk, dv, scale=scale)
    return dq, dk, dv, dw1.to(w1.dtype), dw2.to(w2.dtype)
