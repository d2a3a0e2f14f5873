"""Triton kernels of the MLP's 8-bit products: the rounding of their inputs, and the products whose epilogues do more.

The square leaves the up-projection as bf16 for the backward pass, unless that reads 8 bits, and as e4m3 for the product
that follows, with its largest value. The gradient before the activation leaves its product as e5m2. Persistent as in
relu_squared_mlp_triton.py, with the tensor cores' fast accumulation.

For gradients in 8 bits both leave their products transposed as well: Hopper's products of 8 bits want operands that are
contiguous along the summed dimension, which for the weights' gradients is the tokens. They are stored as words of two
tokens that one thread holds, since words of 16 bits can be transposed on their way to shared memory and bytes cannot. A
thread holds rows 8 apart, so the tokens of every 16 lie in the order 0, 8, 1, 9, ..., 7, 15, which a sum over tokens
does not see; `quantize_both_ways` makes copies in that order too, which it calls paired.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanogpt.kernels.relu_squared_mlp_triton import Config, halves, tile_corner, tile_product

E4M3_MAX = tl.constexpr(448.0)
E5M2_MAX = tl.constexpr(57344.0)
BLOCK = 8192  # numbers that one program rounds
TILES = Config(block_k=128, stages=3)


@triton.jit
def _quantize_mlp_kernel(x_ptr, scale_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=0.0).to(tl.float32) / tl.load(scale_ptr)
    x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=place < count)


@triton.jit
def _paired(x, KIND: tl.constexpr):
    """x (M, N) fp32 rounded to 8 bits, "e4m3" or "e5m2", and transposed: (N, M / 2) int16, rows c and c + 8 of every 16
    in one word.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    low, high = tl.split(tl.permute(tl.reshape(x, (M // 16, 2, 8, N)), (0, 2, 3, 1)))
    words = tl.inline_asm_elementwise(
        "cvt.rn.satfinite." + KIND + "x2.f32 $0, $2, $1;", "=h,r,r", [low, high], dtype=tl.int16, is_pure=True, pack=1
    )
    return tl.reshape(words, (M // 2, N)).T


@triton.jit
def _store_square(
    acc,
    scale,
    scale8,
    post_desc,
    post8_desc,
    transposed_desc,
    row,
    column,
    WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    root = tl.maximum(acc, 0.0)
    square = root * root
    if WIDE:
        post_desc.store([row, column], (square * scale).to(post_desc.dtype))
    square8 = tl.minimum(square * scale8, E4M3_MAX)
    post8_desc.store([row, column], square8.to(post8_desc.dtype))
    if TRANSPOSED:
        transposed_desc.store([column, row // 2], _paired(square8, "e4m3"))


@triton.jit
def _fp8_relu_squared_kernel(
    a_desc,  # (M, K) e4m3
    b_desc,  # (N, K) e4m3
    a_scale_ptr,
    b_scale_ptr,
    post_scale_ptr,
    post_desc,  # (M, N), written where WIDE
    post8_desc,  # (M, N) e4m3
    transposed_desc,  # (N, M / 2) int16, written where TRANSPOSED: words of two e4m3
    peaks_ptr,  # (programs,)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
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
        acc = tile_product(a_desc, b_desc, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K)
        peaks = tl.maximum(peaks, tl.max(acc, axis=1))
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        middle = column + BLOCK_N // 2
        _store_square(left, scale, scale8, post_desc, post8_desc, transposed_desc, row, column, WIDE, TRANSPOSED)
        _store_square(right, scale, scale8, post_desc, post8_desc, transposed_desc, row, middle, WIDE, TRANSPOSED)
    peak = tl.max(peaks)
    peak = peak * peak * scale
    if WIDE:
        peak = peak.to(post_desc.dtype).to(tl.float32)
    tl.store(peaks_ptr + tl.program_id(0), peak)


@triton.jit
def _store_gradient(acc, scale, post_desc, out_desc, transposed_desc, row, column):
    post = post_desc.load([row, column]).to(tl.float32)
    gradient = 2 * tl.sqrt(post) * acc * scale
    gradient = tl.minimum(tl.maximum(gradient, -E5M2_MAX), E5M2_MAX)
    out_desc.store([row, column], gradient.to(out_desc.dtype))
    transposed_desc.store([column, row // 2], _paired(gradient, "e5m2"))


@triton.jit
def _fp8_relu_squared_gradient_kernel(
    a_desc,  # (M, K) e5m2
    b_desc,  # (N, K) e4m3
    b_scale_ptr,
    post_scale_ptr,  # None where post is as it is
    post_desc,  # (M, N)
    out_desc,  # (M, N) e5m2
    transposed_desc,  # (N, M / 2) int16: words of two e5m2
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
    scale = tl.load(b_scale_ptr)  # out keeps a's
    if post_scale_ptr is not None:
        scale *= tl.sqrt(tl.load(post_scale_ptr))
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=True):
        row, column = tile_corner(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        acc = tile_product(a_desc, b_desc, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K)
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _store_gradient(left, scale, post_desc, out_desc, transposed_desc, row, column)
        _store_gradient(right, scale, post_desc, out_desc, transposed_desc, row, column + BLOCK_N // 2)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 of `x / scale`, clamped to its largest number. x contiguous, scale () fp32."""
    out, count = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.numel()
    _quantize_mlp_kernel[(triton.cdiv(count, BLOCK),)](x, scale, out, count, BLOCK=BLOCK, num_warps=8)
    return out


def up_squared_and_quantized(
    x8: Tensor,  # (T, D) e4m3
    x_scale: Tensor,  # () fp32, like the other scales
    up8: Tensor,  # (F, D) e4m3
    up_scale: Tensor,
    post_scale: Tensor,
    dtype: torch.dtype | None,
    transposed: Tensor | None = None,  # (F, T) e4m3, T a multiple of 16
    config: Config = TILES,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """`post = relu((x_scale x8) (up_scale up8)^T)^2` in `dtype`, (T, F); e4m3(post / post_scale); the largest.

    The first is None, and never written, without a `dtype`. Writes the second to `transposed` too, its tokens paired.
    """
    (m, k), n = x8.shape, up8.shape[0]
    post8 = torch.empty((m, n), dtype=torch.float8_e4m3fn, device=x8.device)
    post = None if dtype is None else torch.empty_like(post8, dtype=dtype)
    programs = config.programs(post8)
    peaks = torch.empty(programs, dtype=torch.float32, device=x8.device)
    post8_desc = config.half_tiles(post8)
    _fp8_relu_squared_kernel[(programs,)](
        config.left(x8),
        config.right(up8),
        x_scale,
        up_scale,
        post_scale,
        post8_desc if post is None else config.half_tiles(post),
        post8_desc,
        post8_desc if transposed is None else _half_tiles_of_words(transposed, config),
        peaks,
        m,
        n,
        k,
        WIDE=post is not None,
        TRANSPOSED=transposed is not None,
        **config.options(),
    )
    return post, post8, peaks.amax()


def gradient_both_ways(
    grad8: Tensor,  # (T, D) e5m2, T a multiple of 16
    down8: Tensor,  # (F, D) e4m3
    down_scale: Tensor,  # () fp32, like the other scale
    post: Tensor,  # (T, F)
    post_scale: Tensor | None = None,
    config: Config = TILES,
) -> tuple[Tensor, Tensor]:
    """e5m2 of `2 sqrt(post) * (grad8 (down_scale down8)^T)`, (T, F), scaled as grad8, and its transpose, tokens paired.

    With `post_scale`, the square is `post_scale post`.
    """
    (m, k), n = grad8.shape, down8.shape[0]
    out = torch.empty_like(post, dtype=torch.float8_e5m2)
    transposed = torch.empty(post.mT.shape, dtype=out.dtype, device=out.device)
    _fp8_relu_squared_gradient_kernel[(config.programs(out),)](
        config.left(grad8),
        config.right(down8),
        down_scale,
        post_scale,
        config.half_tiles(post),
        config.half_tiles(out),
        _half_tiles_of_words(transposed, config),
        m,
        n,
        k,
        **config.options(),
    )
    return out, transposed


def _half_tiles_of_words(transposed: Tensor, config: Config) -> TensorDescriptor:
    """What the epilogue stores at a time: a part of an 8-bit matrix (N, M), as words of two."""
    return TensorDescriptor.from_tensor(transposed.view(torch.int16), [config.block_n // 2, config.block_m // 2])
