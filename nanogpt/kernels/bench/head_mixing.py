"""Timing the DC correction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanogpt.kernels.bench import BenchCase, document_ends
from nanogpt.kernels.head_mixing import mix_heads


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """Forward, and forward with backward, at the record's micro-batches; the plain equivalent is this file's."""
    window, heads, head_dim = 112, 6, 128
    for tokens in (16_384, 32_768, 49_152):
        q, k, v, y, grad = (torch.randn(tokens, heads, head_dim, device=device, dtype=torch.bfloat16) for _ in range(5))
        w1, w2 = (torch.randn(tokens, heads, device=device, dtype=torch.bfloat16) for _ in range(2))
        ends = torch.tensor([0, *document_ends(tokens, 2_048, 127)], dtype=torch.int32, device=device)
        inputs = tuple(x.requires_grad_() for x in (y, q, k, v, w1, w2))

        def run(
            function: Callable[..., Tensor],
            train: bool,
            inputs: tuple[Tensor, ...] = inputs,
            ends: Tensor = ends,
            grad: Tensor = grad,
        ) -> object:
            with torch.set_grad_enabled(train):
                out = function(*inputs, ends, window=window, scale=0.1)
            return torch.autograd.grad(out, inputs, grad) if train else out

        product = 2 * tokens * window * heads * head_dim
        for train, name, products, tensors in ((False, "forward", 2, 5), (True, "forward + backward", 7, 14)):
            yield BenchCase(
                f"head mixing, {name}",
                f"{tokens:,} x {heads} x {head_dim}, window {window}",
                functools.partial(run, mix_heads, train),
                functools.partial(run, functools.partial(mix_heads, plain=True), train),
                flops=products * product,
                bytes=tensors * tokens * heads * head_dim * 2,
            )
