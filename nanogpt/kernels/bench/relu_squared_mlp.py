"""Timing the squared-ReLU MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.relu_squared_mlp import relu_squared_mlp, relu_squared_mlp_plain


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """Forward, and forward with backward, for D = 768 and F = 3,072 at the record's micro-batches."""
    width, hidden = 768, 3_072
    for tokens in (16_384, 32_768, 49_152):
        u, grad = (torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for _ in range(2))
        up, down = (0.03 * torch.randn(hidden, width, device=device, dtype=torch.bfloat16) for _ in range(2))
        inputs = tuple(x.requires_grad_() for x in (u, up, down))

        def run(
            mlp: Callable[[Tensor, Tensor, Tensor], Tensor],
            train: bool,
            inputs: tuple[Tensor, ...] = inputs,
            grad: Tensor = grad,
        ) -> object:
            with torch.set_grad_enabled(train):
                out = mlp(*inputs)
            return torch.autograd.grad(out, inputs, grad) if train else out

        weights = 2 * hidden * width
        for train, name, products, numbers in (
            (False, "forward", 2, 2 * tokens * width + weights),
            (True, "forward + backward", 6, 5 * tokens * width + 3 * weights),
        ):
            yield BenchCase(
                f"relu^2 MLP, {name}",
                f"{tokens:,} x {width} x {hidden:,}",
                functools.partial(run, relu_squared_mlp, train),
                functools.partial(run, relu_squared_mlp_plain, train),
                flops=2 * products * tokens * width * hidden,
                bytes=2 * numbers,
            )
