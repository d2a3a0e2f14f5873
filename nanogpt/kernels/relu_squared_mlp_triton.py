"""Triton kernel of the squared-ReLU MLP: a matrix product with the activation, or its derivative, in the epilogue.

Persistent: each program walks over output tiles, so that the loads of the next tile overlap with the epilogue of the
last one. Operands and results move by the tensor memory accelerator (Hopper's bulk copies; ordinary loads before it).
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
    """A tiling of products a b^T: output tile, depth of a step, launch shape, and tile rows that run together."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    warps: int = 8
    stages: int = 4
    group: int = 8

    def programs(self, out: Tensor) -> int:
        """One for each multiprocessor of out's GPU, or for each tile of out (M, N), whichever is fewer."""
        tiles = triton.cdiv(out.shape[0], self.block_m) * triton.cdiv(out.shape[1], self.block_n)
        return min(tiles, torch.cuda.get_device_properties(out.device).multi_processor_count)

    def left(self, a: Tensor) -> TensorDescriptor:
        """Loads of a (M, K)."""
        return TensorDescriptor.from_tensor(a, [self.block_m, self.block_k])

    def right(self, b: Tensor) -> TensorDescriptor:
        """Loads of b (N, K)."""
        return TensorDescriptor.from_tensor(b, [self.block_n, self.block_k])

    def half_tiles(self, out: Tensor) -> TensorDescriptor:
        """The part of out (M, N) that the epilogue stores, or loads, at a time; see `halves`."""
        return TensorDescriptor.from_tensor(out, [self.block_m, self.block_n // 2])

    def options(self) -> dict[str, int]:
        """The kernel's constants, and Triton's own."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@triton.jit
def tile_corner(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile, ordered so that tiles that run together share operands in the L2 cache."""
    group = tile // (GROUP * columns)  # of GROUP tile rows by all columns
    height = tl.minimum(rows - group * GROUP, GROUP)
    within = tile % (GROUP * columns)
    return (group * GROUP + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def tile_product(a_desc, b_desc, row, column, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile of a b^T at row and column, fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a_desc.load([row, k]), b_desc.load([column, k]).T, acc)
    return acc


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns: one after the other they need half the shared memory, which buys
    another stage.
    """
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
    BACKWARD: tl.constexpr,
):
    rows = tl.cdiv(M, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=True):
        row, column = tile_corner(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP)
        acc = tile_product(a_desc, b_desc, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K)
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _epilogue(left, post_desc, out_desc, row, column, BACKWARD)
        _epilogue(right, post_desc, out_desc, row, column + BLOCK_N // 2, BACKWARD)


def matmul_with_epilogue(a: Tensor, b: Tensor, post: Tensor | None, config: Config) -> Tensor:
    """`relu(a b^T)^2`, or `2 sqrt(post) (a b^T)` where `post` is given. a (M, K), b (N, K), post (M, N); bf16."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    out_desc = config.half_tiles(out)
    _relu_squared_kernel[(config.programs(out),)](
        config.left(a),
        config.right(b),
        out_desc if post is None else config.half_tiles(post),
        out_desc,
        m,
        n,
        k,
        BACKWARD=post is not None,
        **config.options(),
    )
    return out


FORWARD = Config(stages=4)
BACKWARD = Config(stages=3)
