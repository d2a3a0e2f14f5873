"""Timing the symmetric products of Polar Express."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.symmetric_matmul import ba_plus_caa, ba_plus_caa_plain, x_xt, x_xt_plain


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """The products of Polar Express for the attention bank (40 x 768 x 768) and the MLP bank (24 x 3,072 x 768).

    Whole banks, as on one GPU, and an eighth, as on eight. Operations are counted for one triangle.
    """
    for matrices, rows in ((40, 768), (5, 768), (24, 3_072), (3, 3_072)):
        x = torch.randn(matrices, rows, 768, device=device, dtype=torch.bfloat16) / rows**0.5
        a = x_xt_plain(x.mT)
        triangle = matrices * 768 * 769
        if rows == 768:
            yield BenchCase(
                "X X^T",
                f"{matrices} x (768 x 768)",
                functools.partial(x_xt, x),
                functools.partial(x_xt_plain, x),
                flops=triangle * 768,
                bytes=2 * (x.numel() + a.numel()),
            )
            yield BenchCase(
                "b A + c A A",
                f"{matrices} x (768 x 768)",
                functools.partial(ba_plus_caa, a, -2.8, 0.5),
                functools.partial(ba_plus_caa_plain, a, -2.8, 0.5),
                flops=triangle * 768,
                bytes=2 * 2 * a.numel(),
            )
        else:
            yield BenchCase(
                "X^T X",
                f"{matrices} x (3,072 x 768)",
                functools.partial(x_xt, x.mT),
                functools.partial(x_xt_plain, x.mT),
                flops=triangle * rows,
                bytes=2 * (x.numel() + a.numel()),
            )
