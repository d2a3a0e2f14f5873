"""Triton kernel of the transposed copy and add: one tile per program, read and written along rows."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """A tile of the source, and the warps that move it."""

    block_m: int = 128
    block_n: int = 128
    warps: int = 8


@triton.jit
def _transposed_add_kernel(
    src_ptr,  # (M, N)
    dst_ptr,  # (N, M)
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    src_inside = (row < M)[:, None] & (column < N)[None, :]
    tile = tl.load(src_ptr + row[:, None] * N + column[None, :], mask=src_inside, other=0.0)
    dst = dst_ptr + column[:, None] * M + row[None, :]
    dst_inside = (column < N)[:, None] & (row < M)[None, :]
    transposed = tile.T
    if ADD:
        transposed = tl.load(dst, mask=dst_inside, other=0.0).to(tl.float32) + transposed.to(tl.float32)
    tl.store(dst, transposed.to(dst_ptr.dtype.element_ty), mask=dst_inside)


def transpose_into(src: Tensor, dst: Tensor, add: bool, config: Config | None = None) -> None:
    """`dst = src.T`, or `dst += src.T` with the sum in fp32. src (m, n), dst (n, m), both contiguous."""
    config = config or Config()
    m, n = src.shape
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n))
    _transposed_add_kernel[grid](
        src,
        dst,
        m,
        n,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        ADD=add,
        num_warps=config.warps,
    )
