"""Triton kernel of the squared-ReLU MLP: a matrix product with the activation, or its derivative, in the epilogue.

Persistent: each program walks over output tiles, so that the loads of the next tile run under the epilogue of the
last one. Operands and results move by the tensor memory accelerator (Hopper's bulk copies; ordinary loads before).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Config(NamedTuple):
    """A tiling: output tile, depth of a step, launch shape, and how many pieces the epilogue stores a tile in."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    warps: int = 8
    stages: int = 4
    pieces: int = 2
    persistent: bool = True
    group: int = 8


@triton.jit
def tile_corner(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile, in an order in which what runs together shares operands in the L2 cache."""
    group = tile // (GROUP * columns)  # of GROUP tile rows by all columns
    height = tl.minimum(rows - group * GROUP, GROUP)
    within = tile % (GROUP * columns)
    return (group * GROUP + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns: stored one after another they need half the shared memory."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _epilogue(acc, post_desc, out_desc, row, column, BACKWARD: tl.constexpr):
    if BACKWARD:
        post = post_desc.load([row, column]).to(tl.float32)
        acc = 2 * tl.sqrt(post) * acc
    else:
        acc = tl.maximum(acc, 0.0)
        acc = acc * acc
    out_desc.store([row, column], acc.to(out_desc.dtype))


@triton.jit
def _relu_squared_kernel(
    a_desc,  # (M, K)
    b_desc,  # (N, K)
    post_desc,  # (M, N), read where BACKWARD
    out_desc,  # (M, N)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    FLATTEN: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    rows = tl.cdiv(M, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile_corner(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(a_desc.load([row, k]), b_desc.load([column, k]).T, acc)

        if PIECES == 1:
            _epilogue(acc, post_desc, out_desc, row, column, BACKWARD)
        else:  # which buys a stage
            left, right = halves(acc, BLOCK_M, BLOCK_N)
            _epilogue(left, post_desc, out_desc, row, column, BACKWARD)
            _epilogue(right, post_desc, out_desc, row, column + BLOCK_N // 2, BACKWARD)


def matmul_with_epilogue(a: Tensor, b: Tensor, post: Tensor | None, config: Config) -> Tensor:
    """`relu(a b^T)^2`, or `2 sqrt(post) (a b^T)` where `post` is given. a (M, K), b (N, K), post (M, N); bf16."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    piece = [config.block_m, config.block_n // config.pieces]
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    programs = tiles
    if config.persistent:
        programs = min(tiles, torch.cuda.get_device_properties(a.device).multi_processor_count)
    out_desc = TensorDescriptor.from_tensor(out, piece)
    _relu_squared_kernel[(programs,)](
        TensorDescriptor.from_tensor(a, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(b, [config.block_n, config.block_k]),
        out_desc if post is None else TensorDescriptor.from_tensor(post, piece),
        out_desc,
        m,
        n,
        k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        PIECES=config.pieces,
        FLATTEN=config.persistent,
        BACKWARD=post is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


FORWARD = Config(stages=4, pieces=2)
BACKWARD = Config(stages=3, pieces=2)
