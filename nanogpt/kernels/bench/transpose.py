"""Timing transposed copies and sums."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.transpose import transpose_add, transpose_add_plain, transpose_copy, transpose_copy_plain


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """Head to embedding and back: (768, 50304) and (50304, 768)."""
    for m, n in ((768, 50_304), (50_304, 768)):
        src = torch.randn(m, n, device=device, dtype=torch.bfloat16)
        dst = torch.randn(n, m, device=device, dtype=torch.bfloat16)
        for name, fast, plain, passes in (
            ("copy", transpose_copy, transpose_copy_plain, 2),
            ("add", transpose_add, transpose_add_plain, 3),
        ):
            yield BenchCase(
                f"transposed {name}",
                f"{m:,} x {n:,}",
                functools.partial(fast, src, dst),
                functools.partial(plain, src, dst),
                flops=0,
                bytes=passes * src.nbytes,
            )
