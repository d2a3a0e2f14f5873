"""Triton kernels around the product of queries, keys and values; see `nanogpt.kernels.packed_qkv` for the formulas.

A program takes a block of tokens and one head: its query and its key, which share their positions' cosines and sines,
and backward its value too. So each number is read once and written once.

Backward, a tile that is rounded once and also stored transposed had wrong numbers in the transposed layout (Triton 3.6,
whose assembler is CUDA 12.8's; right in the interpreter), so a kernel of its own transposes the bytes.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanogpt.kernels.packed_qkv import Rotation


class Config(NamedTuple):
    """Tokens of a program, and its warps."""

    block: int
    warps: int


@triton.jit
def _neighbours(x):
    """Columns 2j and 2j + 1 exchanged."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(odd, even), x.shape)


@triton.jit
def _numbers(ptr, inside):
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _cosines_and_sines(cos_ptr, sin_ptr, token, head, inside, ROTATED: tl.constexpr, PAIRED: tl.constexpr):
    """Each (tokens, ROTATED)."""
    row = 2 * token + head % 2 if PAIRED else token
    place = row[:, None] * ROTATED + tl.arange(0, ROTATED)[None, :]
    return _numbers(cos_ptr + place, inside), _numbers(sin_ptr + place, inside)


@triton.jit
def _norm_and_rotate_kernel(
    qk_ptr,  # (T, 2, H, D)
    cos_ptr,  # (positions, ROTATED), like sin
    sin_ptr,
    out_ptr,  # (2, T, H, D)
    T,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    PAIRED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < T)[:, None]
    cos, sin = _cosines_and_sines(cos_ptr, sin_ptr, token, head, inside, ROTATED, PAIRED)
    leading = tl.arange(0, ROTATED)[None, :]
    for which in tl.static_range(2):
        source = qk_ptr + ((2 * token + which) * H + head)[:, None] * D
        target = out_ptr + ((which * T + token) * H + head)[:, None] * D
        x = _numbers(source + leading, inside)
        squares = tl.sum(x * x, axis=1)
        if D > ROTATED:
            still = ROTATED + tl.arange(0, D - ROTATED)[None, :]
            y = _numbers(source + still, inside)
            squares += tl.sum(y * y, axis=1)
        root = tl.rsqrt(squares / D + eps)[:, None]
        x *= root
        tl.store(target + leading, (cos * x + sin * _neighbours(x)).to(out_ptr.dtype.element_ty), mask=inside)
        if D > ROTATED:
            y = (y * root).to(out_ptr.dtype.element_ty)
            if SHIFTED and which == 1:
                tl.store(target + H * D + still, y, mask=(token + 1 < T)[:, None])
                tl.store(target + still, y, mask=(token == 0)[:, None])
            else:
                tl.store(target + still, y, mask=inside)


@triton.jit
def _store(x, out_ptr, token, start, width, T):
    """x (tokens, columns), saturating at the largest number, into the columns from `start` of (T, width)."""
    column = start + tl.arange(0, x.shape[1])
    place = token[:, None] * width + column[None, :]
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=(token < T)[:, None])


@triton.jit
def _packed_gradient_kernel(
    dq_ptr,  # (T, H, D), like dk
    dk_ptr,
    dv_ptr,  # (T, H, E)
    qk_ptr,  # (T, 2, H, D)
    cos_ptr,  # (positions, ROTATED), like sin
    sin_ptr,
    out_ptr,  # (T, H (2 D + E))
    T,
    factor,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    ROTATED: tl.constexpr,
    PAIRED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < T)[:, None]
    width: tl.constexpr = H * (2 * D + E)
    cos, sin = _cosines_and_sines(cos_ptr, sin_ptr, token, head, inside, ROTATED, PAIRED)
    leading = tl.arange(0, ROTATED)[None, :]
    for which in tl.static_range(2):
        source = qk_ptr + ((2 * token + which) * H + head)[:, None] * D
        grad = (dk_ptr if which == 1 else dq_ptr) + (token * H + head)[:, None] * D
        x = _numbers(source + leading, inside)
        g = _numbers(grad + leading, inside)
        g = cos * g - sin * _neighbours(g)
        squares, along = tl.sum(x * x, axis=1), tl.sum(g * x, axis=1)
        if D > ROTATED:
            still = ROTATED + tl.arange(0, D - ROTATED)[None, :]
            y = _numbers(source + still, inside)
            if SHIFTED and which == 1:
                f = _numbers(grad + H * D + still, (token + 1 < T)[:, None])
                f += _numbers(grad + still, (token == 0)[:, None])
            else:
                f = _numbers(grad + still, inside)
            squares += tl.sum(y * y, axis=1)
            along += tl.sum(f * y, axis=1)
        root = tl.rsqrt(squares / D + eps)
        share = (along * root * root / D)[:, None]
        root = (factor * root)[:, None]
        start = (which * H + head) * D
        _store((g - x * share) * root, out_ptr, token, start, width, T)
        if D > ROTATED:
            _store((f - y * share) * root, out_ptr, token, start + ROTATED, width, T)
    PART: tl.constexpr = min(E, ROTATED)
    for part in tl.static_range(E // PART):
        column = part * PART + tl.arange(0, PART)[None, :]
        g = factor * _numbers(dv_ptr + (token * H + head)[:, None] * E + column, inside)
        start = 2 * H * D + head * E + part * PART
        _store(g, out_ptr, token, start, width, T)


FORWARD = Config(block=64, warps=8)
BACKWARD = Config(block=64, warps=8)


def forward(qk: Tensor, rotation: Rotation, heads: int, config: Config = FORWARD) -> Tensor:
    """See `norm_and_rotate`; all tensors are contiguous."""
    cos, sin, paired, shifted, eps = rotation
    tokens, channels = len(qk), qk.shape[1] // (2 * heads)
    out = qk.new_empty((2, tokens, heads, channels))
    _norm_and_rotate_kernel[(heads, triton.cdiv(tokens, config.block))](
        qk,
        cos,
        sin,
        out,
        tokens,
        eps,
        H=heads,
        D=channels,
        ROTATED=cos.shape[1],
        PAIRED=paired,
        SHIFTED=shifted,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return out


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qk: Tensor,
    rotation: Rotation,
    factor: float,
    dtype: torch.dtype = torch.float8_e4m3fn,
    config: Config = BACKWARD,
) -> Tensor:
    """See `packed_gradient`; all tensors are contiguous, `dtype` is the result's."""
    cos, sin, paired, shifted, eps = rotation
    tokens, heads, channels = dq.shape
    out = torch.empty((tokens, heads * (2 * channels + dv.shape[2])), dtype=dtype, device=dq.device)
    _packed_gradient_kernel[(heads, triton.cdiv(tokens, config.block))](
        dq,
        dk,
        dv,
        qk,
        cos,
        sin,
        out,
        tokens,
        factor,
        eps,
        H=heads,
        D=channels,
        E=dv.shape[2],
        ROTATED=cos.shape[1],
        PAIRED=paired,
        SHIFTED=shifted,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return out
