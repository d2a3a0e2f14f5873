"""Adam with cautious weight decay, one parameter (or one rank's shard of it) at a time."""

from __future__ import annotations

import math

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
