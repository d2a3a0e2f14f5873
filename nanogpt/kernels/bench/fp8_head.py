"""Timing the rounding of weights to 8 bits, once a step, in the layouts of all products that read them."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.fp8_mlp import current_scale, round_matrices
from nanogpt.kernels.transpose import transposed_8bit_plain

WIDTH = 768
# Record 92's: packed queries, keys and values of each shape, the bank of MLPs and the head.
MATRICES = (
    ("packed QKV", 3, 1_536, WIDTH),
    ("packed QKV", 2, 1_152, WIDTH),
    ("packed QKV", 2, 2_304, WIDTH),
    ("MLP bank", 24, 2_816, WIDTH),
    ("head", 1, WIDTH, 50_304),
)


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """Both layouts, with scales that are given. The error is e4m3's, 0.026."""
    for name, count, rows, columns in MATRICES:
        matrices = torch.randn(count, rows, columns, device=device).bfloat16()
        scale = current_scale(matrices, (1, 2))
        same = torch.empty(matrices.shape, dtype=torch.float8_e4m3fn, device=device)
        transposed = torch.empty(matrices.mT.shape, dtype=same.dtype, device=device)
        rounding = functools.partial(round_matrices, matrices, scale, same, transposed)
        yield BenchCase(
            f"weights to 8 bits, {name}",
            f"{count} x ({rows:,} x {columns:,}), both layouts",
            rounding,
            functools.partial(rounding, plain=True),
            flops=0,
            bytes=matrices.nbytes + same.nbytes + transposed.nbytes,
            error=functools.partial(_error, matrices, scale, same, transposed),
        )


def _error(matrices: Tensor, scale: Tensor, same: Tensor, transposed: Tensor) -> float:
    """Of both layouts."""
    round_matrices(matrices, scale, same, transposed)
    exact = matrices.double()
    layouts = same, transposed_8bit_plain(transposed)
    errors = [(x.double() * scale[:, None, None] - exact).norm() / exact.norm() for x in layouts]
    return torch.stack(errors).max().item()  # NaN if either is, which `max` may pass over
