"""Timing the head's loss with logits in e4m3, and the cross-entropy inside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanogpt.gpus import FP8
from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.cross_entropy import _plain_head_loss, head_loss, head_loss_reference, softcap
from nanogpt.kernels.dispatch import runs_kernel
from nanogpt.kernels.e4m3_head import e4m3_cross_entropy, e4m3_cross_entropy_plain
from nanogpt.kernels.fp8_head import Fp8Scales
from nanogpt.kernels.transpose import transposed_8bit_plain

SCALES = Fp8Scales(weight=2.0 / 448, gradient=0.75 / 8 / 448, logits8=True)  # record 92's
SOFTCAP: dict[str, Any] = {"cap": 23.0, "shift": 5.0, "scale": 7.5}
WIDTH = 768


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """Record 92's micro-batches: a first stage's, the two longest ones', and one over the whole vocabulary.

    FP8 products count half their operations, since the machine's rate is for bf16. The head's error is that of its
    gradients, mostly e5m2's rounding; the cross-entropy's is against the gradient of the same logits.
    """
    if not runs_kernel(torch.empty(1, dtype=torch.bfloat16, device=device), needs=FP8):
        return
    reference = torch.compile(functools.partial(head_loss_reference, **SOFTCAP), dynamic=False)
    plain = torch.compile(e4m3_cross_entropy_plain, dynamic=False)
    for tokens, columns, terms in ((16_384, 10_240, 3), (49_152, 14_336, 1), (49_152, 24_576, 1), (40_960, 50_304, 1)):
        x = torch.nn.functional.rms_norm(torch.randn(tokens, WIDTH, device=device), (WIDTH,)).bfloat16()
        lm_head = (3 / WIDTH**0.5 * torch.randn(WIDTH, columns, device=device)).clamp(-2, 2).bfloat16()
        targets = torch.randint(columns, (tokens,), device=device)
        weights = torch.tensor([1.0, 0.5, 0.25][:terms], device=device)
        inputs = x.requires_grad_(), lm_head.requires_grad_(), targets, weights
        yield BenchCase(
            "head loss fp8 with e4m3 logits, forward + backward",
            f"{tokens:,} x {WIDTH} x {columns:,}, {terms} targets",
            functools.partial(_train, functools.partial(head_loss, **SOFTCAP, precision="fp8", fp8=SCALES), *inputs),
            functools.partial(_train, reference, *inputs),
            flops=6 * tokens * WIDTH * columns / 2,
            bytes=4 * (tokens + columns) * WIDTH,
            error=functools.partial(_error_of_head, *inputs),
        )
        logits = torch.empty(tokens, columns, dtype=torch.float8_e4m3fn, device=device)
        for rows, part in zip(logits.split(4_096), x.detach().split(4_096), strict=True):
            rows.copy_(part @ lm_head.detach())
        of_logits = {**SOFTCAP, "grad_factor": 1 / SCALES.gradient, "need_grad": True}
        yield BenchCase(
            "head: cross-entropy of e4m3 logits, gradient in two layouts",
            f"{tokens:,} x {columns:,}, {terms} targets",
            functools.partial(e4m3_cross_entropy, logits, targets, weights, **of_logits),
            functools.partial(plain, logits, targets, weights, prefixes=None, prefix_weight=None, **of_logits),
            flops=0,
            bytes=3 * tokens * columns,
            error=functools.partial(_error_of_gradient, logits, targets, weights),
        )
        del logits


def _train(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs), inputs[:2])


def _error_of_head(x: Tensor, lm_head: Tensor, targets: Tensor, weights: Tensor) -> float:
    found = _train(functools.partial(head_loss, **SOFTCAP, precision="fp8", fp8=SCALES), x, lm_head, targets, weights)
    with torch.no_grad():
        exact = _plain_head_loss(x.double(), lm_head.double(), targets, weights, **SOFTCAP, need_grad=True)[1:]
    return _largest(*(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)))


def _error_of_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> float:
    """Of both layouts, for the first rows, whose terms all lie inside."""
    count = 1_024
    _, grad, transposed = e4m3_cross_entropy(logits, targets, weights, **SOFTCAP, grad_factor=1 / SCALES.gradient)
    assert grad is not None and transposed is not None
    rows = logits[:count].double().requires_grad_()
    log_p = softcap(rows, **SOFTCAP).log_softmax(1)
    terms = [weight * log_p.gather(1, targets[k : k + count, None]).sum() for k, weight in enumerate(weights.tolist())]
    exact = torch.autograd.grad(-sum(terms), rows)[0] / SCALES.gradient
    found = grad[:count].double(), transposed_8bit_plain(transposed[:, :count]).double()
    return _largest(*(((layout - exact).norm() / exact.norm()).item() for layout in found))


def _largest(*errors: float) -> float:
    """NaN if one is, which `max` may pass over."""
    return torch.tensor(errors).max().item()
