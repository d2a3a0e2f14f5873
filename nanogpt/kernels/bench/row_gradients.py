"""Timing gradients that are added to a table's rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.row_gradients import RowOrder, add_rows, add_rows_plain, row_order


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """A value table and the bigram table at the record's micro-batches, rows as frequent as in text."""
    width = 768
    for tokens in (16_384, 32_768, 49_152):
        for name, size, skew in (("tokens", 50_304, 1.0), ("bigrams", 251_520, 0.5)):
            uniform = torch.rand(tokens, device=device)
            order = row_order((size ** (uniform**skew)).long().clamp(max=size - 1))
            table, grads = (torch.randn(n, width, device=device, dtype=torch.bfloat16) for n in (size, tokens))
            touched = int(order.sorted.unique().numel())

            def run(
                function: Callable[[Tensor, RowOrder, Tensor], None],
                table: Tensor = table,
                order: RowOrder = order,
                grads: Tensor = grads,
            ) -> None:
                function(table, order, grads)

            yield BenchCase(
                f"rows of {name} added",
                f"{tokens:,} x {width} into {size:,}, {touched:,} touched",
                functools.partial(run, add_rows),
                functools.partial(run, add_rows_plain),
                flops=0,
                bytes=2 * width * (tokens + 2 * touched),
            )
