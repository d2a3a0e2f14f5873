"""Triton kernel of the symmetric products: tiles on and above the diagonal are computed, and stored twice."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Config(NamedTuple):
    """A tiling: side of an output tile, depth of a step, warps, and stages of the software pipeline."""

    block: int = 128
    block_k: int = 64
    warps: int = 8
    stages: int = 3


@triton.jit
def _symmetric_product_kernel(
    x_desc,  # (batch, M, K), or (batch, K, M) where TRANSPOSED
    a_ptr,  # (batch, M, M), symmetric; read where ADD
    out_ptr,  # (batch, M, M)
    b,
    c,
    d,
    M,
    K,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
):
    matrix = tl.program_id(1)
    # The t-th tile of the triangle, column by column: column j starts at j (j + 1) / 2.
    t = tl.program_id(0)
    j = ((tl.sqrt(8.0 * t + 1.0) - 1.0) / 2).to(tl.int32)
    j += tl.where((j + 1) * (j + 2) // 2 <= t, 1, 0)
    j -= tl.where(j * (j + 1) // 2 > t, 1, 0)
    row = (t - j * (j + 1) // 2) * BLOCK
    column = j * BLOCK

    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if TRANSPOSED:
            left = tl.reshape(x_desc.load([matrix, k, row]), (BLOCK_K, BLOCK)).T
            right = tl.reshape(x_desc.load([matrix, k, column]), (BLOCK_K, BLOCK))
        else:
            left = tl.reshape(x_desc.load([matrix, row, k]), (BLOCK, BLOCK_K))
            right = tl.reshape(x_desc.load([matrix, column, k]), (BLOCK, BLOCK_K)).T
        acc = tl.dot(left, right, acc)

    rows = row + tl.arange(0, BLOCK)[:, None]
    columns = column + tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (columns < M)
    base = matrix.to(tl.int64) * M * M
    if ADD:
        a = tl.load(a_ptr + base + rows * M + columns, mask=inside, other=0.0).to(tl.float32)
        acc = b * a + c * acc + d * (rows == columns).to(tl.float32)
    result = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + base + rows * M + columns, result, mask=inside)
    if row != column:
        mirror_rows = column + tl.arange(0, BLOCK)[:, None]
        mirror_columns = row + tl.arange(0, BLOCK)[None, :]
        inside = (mirror_rows < M) & (mirror_columns < M)
        tl.store(out_ptr + base + mirror_rows * M + mirror_columns, result.T, mask=inside)


def symmetric_product(x: Tensor, a: Tensor | None, b: float, c: float, d: float, out: Tensor, config: Config) -> None:
    """Writes `x x^T` to `out`, or `d I + b a + c x x^T` where `a` is given; bf16.

    x (batch, m, k), contiguous or a transposed view of contiguous memory; a, out (batch, m, m), contiguous.
    """
    batch, m, k = x.shape
    transposed = x.stride(-1) != 1
    block = [1, config.block_k, config.block] if transposed else [1, config.block, config.block_k]
    side = triton.cdiv(m, config.block)
    _symmetric_product_kernel[(side * (side + 1) // 2, batch)](
        TensorDescriptor.from_tensor(x.mT if transposed else x, block),
        out if a is None else a,
        out,
        b,
        c,
        d,
        m,
        k,
        BLOCK=config.block,
        BLOCK_K=config.block_k,
        TRANSPOSED=transposed,
        ADD=a is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def config_for(x: Tensor) -> Config:
    """The tiling for a product of this shape: small tiles where large ones would leave multiprocessors idle."""
    side = triton.cdiv(x.shape[1], 128)
    tiles = x.shape[0] * side * (side + 1) // 2
    if tiles <= torch.cuda.get_device_properties(x.device).multi_processor_count:
        return Config(block=64, block_k=64, warps=4, stages=4)
    return Config()
