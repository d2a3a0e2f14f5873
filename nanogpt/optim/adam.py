"""Adam with cautious weight decay, on parameters or on one rank's shards of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def adam_step_size(lr: float, betas: tuple[float, float], count: int) -> float:
    """Learning rate with both bias corrections, for the `count`-th step (from 1)."""
    return lr * math.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count)


def adam_update(
    parameter: Tensor,  # any shape and float dtype, changed in place
    gradient: Tensor,  # same shape
    exp_avg: Tensor,  # same shape, fp32, changed in place
    exp_avg_sq: Tensor,  # same shape, fp32, changed in place
    step_size: Tensor,  # () fp32, see adam_step_size
    decay: Tensor,  # () fp32: lr^2 * weight decay
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step. Decay acts only where the update already moves the weight towards zero (Liang et al., 2024).

    `eps` is added to the uncorrected root: m / (sqrt(v) + eps) * lr * sqrt(1 - b2^n) / (1 - b1^n). All in fp32; the
    result is rounded once to the parameter's dtype.
    """
    g = gradient.to(exp_avg.dtype)
    exp_avg.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    weight = parameter.to(exp_avg.dtype)
    update = exp_avg / (exp_avg_sq.sqrt() + eps) * step_size
    update = torch.where(update * weight > 0, update + weight * decay, update)
    parameter.copy_(weight - update)


def adam_updates(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step_sizes: Sequence[Tensor],
    decays: Sequence[Tensor],
    betas: Sequence[tuple[float, float]],
    eps: float,
) -> None:
    """`adam_update` for each parameter: under torch.compile one graph, and one call from Python, for all."""
    each = zip(parameters, gradients, exp_avgs, exp_avg_sqs, step_sizes, decays, betas, strict=True)
    for p, g, exp_avg, exp_avg_sq, step_size, decay, own_betas in each:
        adam_update(p, g, exp_avg, exp_avg_sq, step_size, decay, own_betas, eps)
