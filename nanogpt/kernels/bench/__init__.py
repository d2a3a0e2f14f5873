"""What `nanogpt bench kernels` times: a module for each kernel, with `bench_cases(device) -> Iterator[BenchCase]`.

Every module of this package is picked up. A case's inputs live only while that case is being timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BenchCase:
    """One kernel at one shape. `fast` and `plain` run it once on inputs that they hold."""

    name: str
    shape: str
    fast: Callable[[], object]
    plain: Callable[[], object] | None
    flops: float
    """Multiplications and additions that the result needs (what a kernel computes beyond them counts against it)."""
    bytes: float
    """Each input read once, each output written once."""
    error: Callable[[], float] | None = None
    """Of `fast` against fp64 on the same inputs: ||out - exact|| / ||exact||, the largest over all outputs."""


def document_ends(tokens: int, longest: int, entries: int) -> list[int]:
    """Ends of made-up documents with about the lengths of FineWeb's, padded with `tokens` to `entries` numbers.

    Lengths are log-normal with median 500, cut at `longest` tokens; the draw is fixed.
    """
    generator = torch.Generator().manual_seed(0)
    ends: list[int] = []
    while not ends or ends[-1] < tokens:
        length = int(500 * torch.randn((), generator=generator).exp())
        ends.append(min((ends[-1] if ends else 0) + min(max(length, 8), longest), tokens))
    return ends + [tokens] * (entries - len(ends))
