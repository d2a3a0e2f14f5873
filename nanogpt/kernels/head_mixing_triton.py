"""Triton kernels of the DC correction; see `nanogpt.kernels.head_mixing` for the formulas.

Forward, and the gradients of q, w1 and w2: a program takes 16 queries and the 128 keys that end with the last of them,
which is all that a window of 112 can reach, so there is no loop over keys. The gradients of k and v: a program takes 16
keys and the 128 queries that begin with the first of them, and computes the weights anew. So every gradient has one
writer, nothing is added atomically, and the result is the same every time.

Each kernel goes over the heads twice, since the mixture needs all of them before any can use it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

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
    """One head's rows of a (T, H) tensor in fp32, as a column."""
    return tl.load(ptr + rows * H + head, mask=inside, other=0.0).to(tl.float32)[:, None]


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
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.program_id(0).to(tl.int64) * BLOCK + BLOCK - REACH + tl.arange(0, REACH)
    in_q, in_k = query < T, (key >= 0) & (key < T)
    first = tl.load(first_ptr + query, mask=in_q, other=0)
    visible = (key[None, :] >= first[:, None]) & (key[None, :] <= query[:, None])

    mixture = tl.zeros((BLOCK, REACH), tl.float32)
    for h in range(H):
        scores = _scores(_tile(q_ptr, query, in_q, h, H, D), _tile(k_ptr, key, in_k, h, H, D), visible, scale)
        top = tl.max(scores, axis=1)
        p = tl.exp(scores - top[:, None])
        total = tl.sum(p, axis=1)
        tl.store(lse_ptr + query * H + h, top + tl.log(total), mask=in_q)
        mixture += _numbers(w1_ptr, query, in_q, h, H) / total[:, None] * p
    for h in range(H):
        v = _tile(v_ptr, key, in_k, h, H, D)
        weights = (_numbers(w2_ptr, query, in_q, h, H) * mixture).to(v.dtype)
        place = (query[:, None] * H + h) * D + tl.arange(0, D)[None, :]
        tl.store(out_ptr + place, tl.dot(weights, v, input_precision="ieee"), mask=in_q[:, None])


@triton.jit
def _mix_heads_query_gradients_kernel(
    grad_ptr,  # (T, H, D) fp32
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
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.program_id(0).to(tl.int64) * BLOCK + BLOCK - REACH + tl.arange(0, REACH)
    in_q, in_k = query < T, (key >= 0) & (key < T)
    first = tl.load(first_ptr + query, mask=in_q, other=0)
    visible = (key[None, :] >= first[:, None]) & (key[None, :] <= query[:, None]) & in_q[:, None]

    mixture = tl.zeros((BLOCK, REACH), tl.float32)
    d_mixture = tl.zeros((BLOCK, REACH), tl.float32)
    for h in range(H):
        k = _tile(k_ptr, key, in_k, h, H, D)
        scores = _scores(_tile(q_ptr, query, in_q, h, H, D), k, visible, scale)
        p = tl.exp(scores - _numbers(lse_ptr, query, in_q, h, H))
        mixture += _numbers(w1_ptr, query, in_q, h, H) * p
        grad = _tile(grad_ptr, query, in_q, h, H, D).to(k.dtype)
        d_weights = tl.dot(grad, _tile(v_ptr, key, in_k, h, H, D).T, input_precision="ieee")
        d_mixture += _numbers(w2_ptr, query, in_q, h, H) * d_weights
        # The mixture is not whole yet: dw2 below.
    for h in range(H):
        k = _tile(k_ptr, key, in_k, h, H, D)
        grad = _tile(grad_ptr, query, in_q, h, H, D).to(k.dtype)
        d_weights = tl.dot(grad, _tile(v_ptr, key, in_k, h, H, D).T, input_precision="ieee")
        tl.store(dw2_ptr + query * H + h, tl.sum(mixture * d_weights, axis=1), mask=in_q)
        scores = _scores(_tile(q_ptr, query, in_q, h, H, D), k, visible, scale)
        p = tl.exp(scores - _numbers(lse_ptr, query, in_q, h, H))
        dw1 = tl.sum(p * d_mixture, axis=1)
        tl.store(dw1_ptr + query * H + h, dw1, mask=in_q)
        d_scores = p * _numbers(w1_ptr, query, in_q, h, H) * (d_mixture - dw1[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, input_precision="ieee") * scale
        place = (query[:, None] * H + h) * D + tl.arange(0, D)[None, :]
        tl.store(dq_ptr + place, dq.to(k.dtype), mask=in_q[:, None])


@triton.jit
def _mix_heads_key_gradients_kernel(
    grad_ptr,  # (T, H, D) fp32
    q_ptr,
    k_ptr,
    v_ptr,
    w1_ptr,
    w2_ptr,
    first_ptr,
    lse_ptr,
    dw1_ptr,  # (T, H) fp32, of the kernel above
    dk_ptr,
    dv_ptr,
    T,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,
):
    key = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, REACH)
    in_q, in_k = query < T, key < T
    first = tl.load(first_ptr + query, mask=in_q, other=0)
    visible = (key[None, :] >= first[:, None]) & (key[None, :] <= query[:, None]) & in_q[:, None]

    mixture = tl.zeros((REACH, BLOCK), tl.float32)
    d_mixture = tl.zeros((REACH, BLOCK), tl.float32)
    for h in range(H):
        k = _tile(k_ptr, key, in_k, h, H, D)
        scores = _scores(_tile(q_ptr, query, in_q, h, H, D), k, visible, scale)
        p = tl.exp(scores - _numbers(lse_ptr, query, in_q, h, H))
        mixture += _numbers(w1_ptr, query, in_q, h, H) * p
        grad = _tile(grad_ptr, query, in_q, h, H, D).to(k.dtype)
        d_weights = tl.dot(grad, _tile(v_ptr, key, in_k, h, H, D).T, input_precision="ieee")
        d_mixture += _numbers(w2_ptr, query, in_q, h, H) * d_weights
    for h in range(H):
        k = _tile(k_ptr, key, in_k, h, H, D)
        q = _tile(q_ptr, query, in_q, h, H, D)
        grad = _tile(grad_ptr, query, in_q, h, H, D).to(k.dtype)
        place = (key[:, None] * H + h) * D + tl.arange(0, D)[None, :]
        weights = (_numbers(w2_ptr, query, in_q, h, H) * mixture).to(k.dtype)
        dv = tl.dot(weights.T, grad, input_precision="ieee")
        tl.store(dv_ptr + place, dv.to(k.dtype), mask=in_k[:, None])
        p = tl.exp(_scores(q, k, visible, scale) - _numbers(lse_ptr, query, in_q, h, H))
        rest = d_mixture - _numbers(dw1_ptr, query, in_q, h, H)
        d_scores = p * _numbers(w1_ptr, query, in_q, h, H) * rest
        dk = tl.dot(d_scores.to(k.dtype).T, q, input_precision="ieee") * scale
        tl.store(dk_ptr + place, dk.to(k.dtype), mask=in_k[:, None])


BLOCK, REACH = 16, 128  # queries (or keys) of a program, and what they reach: a window of REACH - BLOCK tokens


def forward(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, first: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The correction (T, H, D) and the scores' logsumexp (T, H), fp32; all inputs contiguous."""
    tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    sizes = {"H": heads, "D": head_dim, "BLOCK": BLOCK, "REACH": REACH}
    grid = (triton.cdiv(tokens, BLOCK),)
    _mix_heads_kernel[grid](q, k, v, w1, w2, first, out, lse, tokens, scale, **sizes, num_warps=4)
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, w1, w2 in their dtypes."""
    tokens, heads, head_dim = q.shape
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dw1, dw2 = (torch.empty_like(lse) for _ in range(2))
    sizes = {"H": heads, "D": head_dim, "BLOCK": BLOCK, "REACH": REACH}
    grid = (triton.cdiv(tokens, BLOCK),)
    inputs = (grad, q, k, v, w1, w2, first, lse)
    # Three stages of loads would need 254 KB of shared memory for the keys' kernel; a multiprocessor of sm_90 has 227.
    _mix_heads_query_gradients_kernel[grid](*inputs, dq, dw1, dw2, tokens, scale, **sizes, num_warps=8, num_stages=2)
    _mix_heads_key_gradients_kernel[grid](*inputs, dw1, dk, dv, tokens, scale, **sizes, num_warps=8, num_stages=2)
    return dq, dk, dv, dw1.to(w1.dtype), dw2.to(w2.dtype)
