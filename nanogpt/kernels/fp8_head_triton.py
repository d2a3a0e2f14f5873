"""Triton kernels around the FP8 products: 8-bit copies of a matrix in both layouts, and an 8-bit transpose.

Hopper's FP8 matrix instructions want both operands contiguous along the summed dimension, so the backward products need
transposed copies. Tiles are 64 bytes or more along either side, so that reads and writes fill whole sectors.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """A tile of the source (rows, columns; in words of four columns for the transpose), and the warps that move it."""

    block_m: int
    block_n: int
    warps: int


@triton.jit
def _quantize_both_ways_kernel(
    src_ptr,  # (B, M, N) bf16, or 8-bit
    scale_ptr,  # (B,), to divide by; None: multiply by FACTOR instead
    same_ptr,  # (B, M, N), 8-bit, or None, like the next
    transposed_ptr,  # (B, N, M), 8-bit
    src_stride,  # from matrix to matrix
    M,
    N,
    FACTOR: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    transposed_row = tl.arange(0, BLOCK_M)
    row = transposed_row
    if PAIRED:
        row = transposed_row // 16 * 16 + transposed_row % 2 * 8 + transposed_row % 16 // 2
    transposed_row += start
    row += start
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (column < N)[None, :]
    place = row[:, None] * N + column[None, :]
    scaled = tl.load(src_ptr + batch * src_stride + place, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is None:
        scaled *= FACTOR
    else:
        scaled /= tl.load(scale_ptr + batch)
    # The conversion saturates at the largest number; NaN stays NaN.
    if same_ptr is not None:
        tl.store(same_ptr + batch * M * N + place, scaled.to(same_ptr.dtype.element_ty), mask=inside)
    if transposed_ptr is not None:
        transposed_place = batch * M * N + column[:, None] * M + transposed_row[None, :]
        transposed = scaled.to(transposed_ptr.dtype.element_ty).T
        tl.store(
            transposed_ptr + transposed_place, transposed, mask=(column < N)[:, None] & (transposed_row < M)[None, :]
        )


@triton.jit
def _permute(a, b, SELECT: tl.constexpr):
    """Four of the eight bytes of two words (bytes 0-3 of a, 4-7 of b), chosen by the hexadecimal digits of SELECT."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, " + SELECT + ";", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _transpose_gradient_kernel(
    src_ptr,  # (M, N / 4) int32, four bytes each
    dst_ptr,  # (N, M / 4) int32
    M_WORDS,  # M / 4
    N_WORDS,  # N / 4
    BLOCK_M: tl.constexpr,  # in words of four rows
    BLOCK_N: tl.constexpr,  # in words of four columns
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < M_WORDS)[:, None] & (column < N_WORDS)[None, :]
    src = src_ptr + 4 * row[:, None] * N_WORDS + column[None, :]
    w0 = tl.load(src, mask=inside, other=0)
    w1 = tl.load(src + N_WORDS, mask=inside, other=0)
    w2 = tl.load(src + 2 * N_WORDS, mask=inside, other=0)
    w3 = tl.load(src + 3 * N_WORDS, mask=inside, other=0)
    # A 4 x 4 transpose of bytes within four words, then the words of a tile trade places.
    a, b = _permute(w0, w1, "0x5140"), _permute(w0, w1, "0x7362")
    c, d = _permute(w2, w3, "0x5140"), _permute(w2, w3, "0x7362")
    transposed_inside = (column < N_WORDS)[:, None] & (row < M_WORDS)[None, :]
    dst = dst_ptr + 4 * column[:, None] * M_WORDS + row[None, :]
    tl.store(dst, _permute(a, c, "0x5410").T, mask=transposed_inside)
    tl.store(dst + M_WORDS, _permute(a, c, "0x7632").T, mask=transposed_inside)
    tl.store(dst + 2 * M_WORDS, _permute(b, d, "0x5410").T, mask=transposed_inside)
    tl.store(dst + 3 * M_WORDS, _permute(b, d, "0x7632").T, mask=transposed_inside)


def quantize_both_ways(
    src: Tensor,  # (M, N) bf16, contiguous
    scale: float | Tensor,  # or () fp32
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    paired: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`src / scale` in the 8-bit float `dtype`, saturating, (M, N), and its transpose, (N, M).

    `paired`: the transpose has the rows of every 16 in the order 0, 8, 1, 9, ..., 7, 15; M is a multiple of 16.
    """
    m, n = src.shape
    same = torch.empty((m, n), dtype=dtype, device=src.device)
    transposed = torch.empty((n, m), dtype=dtype, device=src.device)
    given, factor = (scale, None) if isinstance(scale, Tensor) else (None, 1 / scale)
    _launch_quantize(src[None], given, same, transposed, factor=factor, paired=paired, config=config or QUANTIZE)
    return same, transposed


def paired_transpose(src: Tensor) -> Tensor:
    """The transpose (N, M), paired as by `quantize_both_ways`, of 8-bit floats src (M, N), contiguous."""
    transposed = torch.empty(src.mT.shape, dtype=src.dtype, device=src.device)
    _launch_quantize(src[None], None, None, transposed, factor=1.0, paired=True, config=QUANTIZE)
    return transposed


def quantize_matrices(
    src: Tensor,  # (B, M, N) bf16, each matrix contiguous
    scale: Tensor,  # (B,) fp32
    same: Tensor | None,  # (B, M, N), 8-bit, written
    transposed: Tensor | None,  # (B, N, M), 8-bit, written
) -> None:
    """`src / scale`, saturating, into whichever layouts are given, each matrix as by `quantize_both_ways`."""
    _launch_quantize(src, scale, same, transposed, factor=None, paired=False, config=QUANTIZE)


def _launch_quantize(
    src: Tensor,
    scale: Tensor | None,
    same: Tensor | None,
    transposed: Tensor | None,
    *,
    factor: float | None,
    paired: bool,
    config: Config,
) -> None:
    matrices, m, n = src.shape
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), matrices)
    _quantize_both_ways_kernel[grid](
        src,
        scale,
        same,
        transposed,
        src.stride(0),
        m,
        n,
        FACTOR=factor,
        PAIRED=paired,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
    )


def transpose_bytes(src: Tensor, config: Config | None = None) -> Tensor:
    """The transpose (N, M), contiguous, of an 8-bit matrix. src (M, N) contiguous, M and N multiples of 4."""
    m, n = src.shape
    out = torch.empty((n, m), dtype=src.dtype, device=src.device)
    config = config or TRANSPOSE
    grid = (triton.cdiv(m // 4, config.block_m), triton.cdiv(n // 4, config.block_n))
    _transpose_gradient_kernel[grid](
        src.view(torch.int32),
        out.view(torch.int32),
        m // 4,
        n // 4,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
    )
    return out


QUANTIZE = Config(64, 64, 4)
TRANSPOSE = Config(32, 32, 4)
