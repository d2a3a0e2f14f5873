"""NorMuon: Muon (Jordan et al., 2024) with a variance estimate for each row (Li et al., 2025), on banks of matrices.

The bf16 weight is the upper half of an fp32 weight. Its lower 16 bits (the "mantissa") stay with the rank that owns
the shard, so small updates are not lost to rounding, and only the upper half is communicated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt.optim.polar_express import polar_express

FLOOR = 1e-10


def nesterov_momentum(gradient: Tensor, momentum: Tensor, mu: Tensor) -> Tensor:
    """Update `momentum` (fp32) in place, M <- lerp(M, G, 1 - mu), and return lerp(G, M, mu) in fp32. mu is ()."""
    g = gradient.to(momentum.dtype)
    momentum.add_((g - momentum) * (1 - mu))
    return g + (momentum - g) * mu


def reduce_variance(
    x: Tensor,  # (n, rows, columns)
    second_moment: Tensor,  # (n, rows, 1) if rows >= columns, else (n, 1, columns); fp32, changed in place
    beta2: float,
) -> Tensor:
    """Divide each row (column, if there are more of them) by its running root mean square, keeping the Frobenius norm.

    The running mean starts at 0 without bias correction: the rescaling to the old norm compensates. Statistics
    in fp32, the result in x's dtype.
    """
    wide = x.to(second_moment.dtype)
    dim = second_moment_dim(x.shape)
    second_moment.lerp_(wide.square().mean(dim=dim, keepdim=True), 1 - beta2)
    scaled = wide * second_moment.clamp(min=FLOOR).rsqrt()
    old_norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    new_norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    return (scaled * (old_norm / new_norm.clamp(min=FLOOR))).to(x.dtype)


def second_moment_dim(shape: Sequence[int]) -> int:
    """The dimension that the variance estimate averages over: the columns, or the rows if there are fewer of them."""
    return -1 if shape[-2] >= shape[-1] else -2


def join_mantissa(weight: Tensor, mantissa: Tensor) -> Tensor:
    """fp32 weights from their upper halves (bf16) and lower halves (int16 bit patterns), of one shape."""
    upper = weight.view(torch.int16).to(torch.int32) << 16
    return (upper | (mantissa.to(torch.int32) & 0xFFFF)).view(torch.float32)


def split_mantissa(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 weights to (upper half as bf16, truncated and not rounded; lower half as int16 bit patterns)."""
    bits = weight.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def cautious_update(
    weight: Tensor,  # (n, rows, columns) fp32
    x: Tensor,  # the same shape, any float dtype
    gate: Tensor,  # likewise
    step_size: Tensor,  # (n, 1, 1) fp32: multiplier * lr of each matrix
    decay: Tensor,  # () fp32: weight decay * lr
) -> Tensor:
    """`weight - step_size * x`, and decay by `decay * step_size` where gate and weight do not disagree in sign."""
    decayed = torch.where(gate.to(weight.dtype) * weight >= 0, weight * decay, torch.zeros_like(weight))
    return weight - step_size * (x.to(weight.dtype) + decayed)


def apply_update(
    weight: Tensor,  # (n, rows, columns), changed in place
    mantissa: Tensor | None,  # int16, the same shape, changed in place; None for weights of fp32 or wider
    x: Tensor,  # this and the rest: see cautious_update
    gate: Tensor,
    step_size: Tensor,
    decay: Tensor,
) -> None:
    """`cautious_update` in fp32, or the weight's wider dtype, of a weight that may be in two halves."""
    if mantissa is None:
        weight.copy_(cautious_update(weight, x, gate, step_size, decay))
        return
    upper, lower = split_mantissa(cautious_update(join_mantissa(weight, mantissa), x, gate, step_size, decay))
    weight.copy_(upper)
    mantissa.copy_(lower)


def normuon_update(
    weight: Tensor,  # (n, rows, columns), changed in place
    gradient: Tensor,  # the same shape
    momentum: Tensor,  # the same shape, fp32, changed in place
    second_moment: Tensor,  # see reduce_variance
    mantissa: Tensor | None,  # int16, the weight's shape, changed in place; None for fp32 weights
    mu: Tensor,  # () fp32
    step_size: Tensor,  # (n, 1, 1) fp32
    decay: Tensor,  # () fp32
    beta2: float,
    coefficients: Sequence[tuple[float, float, float]],
    norm_margin: float,
    plain_kernels: bool = False,
) -> None:
    """One step: Nesterov momentum, Polar Express in the weight's dtype, variance reduction, cautious update."""
    x = nesterov_momentum(gradient, momentum, mu).to(weight.dtype)
    x = polar_express(x, coefficients, norm_margin, plain_kernels)
    x = reduce_variance(x, second_moment, beta2)
    apply_update(weight, mantissa, x, x, step_size, decay)
