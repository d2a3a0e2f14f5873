"""Triton kernels of the MLP's 8-bit products: the rounding of their input, and the first with squares in its epilogue.

The square leaves the up-projection as bf16 for the backward pass and as e4m3 for the product that follows, with its
largest value. Persistent as in relu_squared_mlp_triton.py, with the tensor cores' fast accumulation.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanogpt.kernels.relu_squared_mlp_triton import Config, halves, tile_corner

E4M3_MAX = tl.constexpr(448.0)
BLOCK = 8192  # numbers of a program that rounds
UP = Config(block_k=128, stages=3)


@triton.jit
def _quantize_mlp_kernel(x_ptr, scale_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=0.0).to(tl.float32) / tl.load(scale_ptr)
    x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=place < count)


@triton.jit
def _store_square(acc, scale, scale8, post_desc, post8_desc, row, column):
    root = tl.maximum(acc, 0.0)
    square = root * root
    post_desc.store([row, column], (square * scale).to(post_desc.dtype))
    post8_desc.store([row, column], tl.minimum(square * scale8, E4M3_MAX).to(post8_desc.dtype))


@triton.jit
def _fp8_relu_squared_kernel(
    a_desc,  # (M, K) e4m3
    b_desc,  # (N, K) e4m3
    a_scale_ptr,
    b_scale_ptr,
    post_scale_ptr,
    post_desc,  # (M, N)
    post8_desc,  # (M, N) e4m3
    peaks_ptr,  # (programs,)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    rows = tl.cdiv(M, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    root_scale = tl.load(a_scale_ptr) * tl.load(b_scale_ptr)
    scale = root_scale * root_scale
    scale8 = scale / tl.load(post_scale_ptr)
    # Squaring, scaling and rounding keep the order of numbers: the largest of the products becomes the largest of all.
    peaks = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=True):
        row, column = tile_corner(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(a_desc.load([row, k]), b_desc.load([column, k]).T, acc)
        peaks = tl.maximum(peaks, tl.max(acc, axis=1))
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _store_square(left, scale, scale8, post_desc, post8_desc, row, column)
        _store_square(right, scale, scale8, post_desc, post8_desc, row, column + BLOCK_N // 2)
    peak = tl.max(peaks)
    peak = (peak * peak * scale).to(post_desc.dtype).to(tl.float32)
    tl.store(peaks_ptr + tl.program_id(0), peak)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 of `x / scale`, cut off at 448. x contiguous, scale () fp32."""
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _quantize_mlp_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, scale, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out


def up_squared_and_quantized(
    x8: Tensor,  # (T, D) e4m3
    x_scale: Tensor,  # () fp32, like the other scales
    up8: Tensor,  # (F, D) e4m3
    up_scale: Tensor,
    post_scale: Tensor,
    dtype: torch.dtype,
    config: Config = UP,
) -> tuple[Tensor, Tensor, Tensor]:
    """`post = relu((x_scale x8) (up_scale up8)^T)^2` in `dtype`, (T, F); e4m3(post / post_scale); the largest."""
    (m, k), n = x8.shape, up8.shape[0]
    post = torch.empty((m, n), dtype=dtype, device=x8.device)
    post8 = torch.empty((m, n), dtype=torch.float8_e4m3fn, device=x8.device)
    programs = config.programs(post)
    peaks = torch.empty(programs, dtype=torch.float32, device=x8.device)
    _fp8_relu_squared_kernel[(programs,)](
        config.left(x8),
        config.right(up8),
        x_scale,
        up_scale,
        post_scale,
        config.half_tiles(post),
        config.half_tiles(post8),
        peaks,
        m,
        n,
        k,
        **config.options(),
    )
    return post, post8, peaks.amax()
