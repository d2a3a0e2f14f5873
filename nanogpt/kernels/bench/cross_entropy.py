"""Timing the head's loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nanogpt.gpus import FP8
from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.cross_entropy import head_loss, head_loss_reference, head_mean_loss
from nanogpt.kernels.dispatch import runs_kernel
from nanogpt.kernels.fp8_head import Precision


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """The head's loss, forward and backward, at the record's micro-batches; the kernel inside it; and evaluation.

    The plain equivalent of the first is `head_loss_reference` compiled. FP8 products count half their operations, since
    the machine's rate is for bf16.
    """
    from nanogpt.kernels.cross_entropy_triton import loss_and_gradient

    width, vocab = 768, 50_304
    softcap: dict[str, Any] = {"cap": 23.0, "shift": 5.0, "scale": 7.5}
    kernel = functools.partial(loss_and_gradient, **softcap)
    lm_head = (0.1 * torch.randn(width, vocab, device=device)).bfloat16().requires_grad_()
    reference = torch.compile(functools.partial(head_loss_reference, **softcap), dynamic=False)

    def train(function: Callable[..., Tensor], *inputs: Tensor) -> object:
        return torch.autograd.grad(function(*inputs), inputs[:2])

    fp8 = runs_kernel(lm_head, needs=FP8)
    precisions: tuple[tuple[Precision, int], ...] = (("fp8", 2), ("bf16", 1)) if fp8 else (("bf16", 1),)
    gradients = [*([("e5m2", torch.float8_e5m2, 3)] if fp8 else []), ("bf16", torch.bfloat16, 4)]
    for tokens, terms in ((16_384, 3), (32_768, 2), (49_152, 1)):
        x = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
        targets = torch.randint(vocab, (tokens,), device=device)
        weights = torch.ones(terms, device=device)
        inputs = (x, lm_head, targets, weights)
        shape = f"{tokens:,} x {width} x {vocab:,}, {terms} targets"
        for precision, rate in precisions:
            yield BenchCase(
                f"head loss {precision}, forward + backward",
                shape,
                functools.partial(train, functools.partial(head_loss, **softcap, precision=precision), *inputs),
                functools.partial(train, reference, *inputs),
                flops=6 * tokens * width * vocab / rate,
                bytes=4 * (tokens + vocab) * width,
            )
        with torch.no_grad():
            logits = x @ lm_head
        for name, dtype, number_bytes in gradients:
            grad = torch.empty_like(logits, dtype=dtype)
            yield BenchCase(
                f"cross-entropy with {name} gradient, from logits",
                f"{tokens:,} x {vocab:,}, {terms} targets",
                functools.partial(kernel, logits, targets, weights, grad),
                None,
                flops=0,
                bytes=number_bytes * tokens * vocab,
            )
        del logits, grad

    tokens = 262_144
    x = torch.randn(tokens, width, device=device).bfloat16()
    targets = torch.randint(vocab, (tokens,), device=device)
    yield BenchCase(
        "head loss, evaluation",
        f"{tokens:,} x {width} x {vocab:,}",
        functools.partial(head_mean_loss, x, lm_head.detach(), targets, **softcap),
        None,
        flops=2 * tokens * width * vocab,
        bytes=2 * (tokens + vocab) * width,
    )
