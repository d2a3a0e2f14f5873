"""Timing the symmetric products of Polar Express."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.symmetric_matmul import ba_plus_caa, ba_plus_caa_plain, x_xt, x_xt_plain

WIDTH = 768


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """The products of Polar Express for the banks of matrices.

    Record 89's banks of attention and of MLPs whole, as on one GPU, and an eighth, as on eight; then record 92's three,
    whole. Operations are counted for one triangle.
    """
    banks = ((40, 768), (5, 768), (24, 3_072), (3, 3_072), (48, 256), (16, 768), (24, 2_816))
    for matrices, rows in banks:
        x = torch.randn(matrices, rows, WIDTH, device=device, dtype=torch.bfloat16) / rows**0.5
        tall = rows > WIDTH
        smaller = x.mT if tall else x
        a = x_xt_plain(smaller)
        side = a.shape[1]
        triangle = matrices * side * (side + 1)
        yield BenchCase(
            "X^T X" if tall else "X X^T",
            f"{matrices} x ({rows:,} x {WIDTH})",
            functools.partial(x_xt, smaller),
            functools.partial(x_xt_plain, smaller),
            flops=triangle * smaller.shape[2],
            bytes=2 * (x.numel() + a.numel()),
        )
        if not tall:
            yield BenchCase(
                "b A + c A A",
                f"{matrices} x ({side} x {side})",
                functools.partial(ba_plus_caa, a, -2.8, 0.5),
                functools.partial(ba_plus_caa_plain, a, -2.8, 0.5),
                flops=triangle * side,
                bytes=2 * 2 * a.numel(),
            )
