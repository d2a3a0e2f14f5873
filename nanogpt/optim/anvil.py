"""ANVIL: NorMuon with two momenta, on banks of matrices (public record 92, PR #360, "ANVIL2").

Differences from `nanogpt.optim.normuon`, on whose parts it is built:
- A fast and a slow momentum; from some step on, the update comes from a blend of both.
- Polar Express takes the norm from the first Gram matrix, which the first polynomial also uses.
- Decay acts where the slow momentum would not push the weight away from zero; in NorMuon, where the update would not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt.kernels.symmetric_matmul import x_xt, x_xt_plain
from nanogpt.optim.normuon import apply_update, reduce_variance
from nanogpt.optim.polar_express import NORM_FLOOR, odd_polynomials


def blended_momentum(
    gradient: Tensor,
    fast: Tensor,  # the gradient's shape, fp32, changed in place
    slow: Tensor,  # likewise
    mu: Tensor,  # () fp32, as the next two
    fast_beta: Tensor,
    fast_share: Tensor,
    slow_beta: float,
) -> Tensor:
    """F <- lerp(F, G, 1 - fast_beta), S <- lerp(S, G, 1 - slow_beta); returns lerp(G, w F + (1 - w) S, mu) in fp32.

    w is fast_share; with 1 and a fast_beta of mu this is NorMuon's momentum to the last bit.
    """
    g = gradient.to(fast.dtype)
    fast.add_((g - fast) * (1 - fast_beta))
    slow.add_((g - slow) * (1 - slow_beta))
    blend = fast_share * fast + (1 - fast_share) * slow
    return g + (blend - g) * mu


def polar_express_by_gram(
    matrices: Tensor,  # (n, rows, columns), bf16 or wider
    coefficients: Sequence[tuple[float, float, float]],
    norm_margin: float,
    plain_kernels: bool = False,
) -> Tensor:
    """As `polar_express`, with the Frobenius norm as the root of the Gram matrix's trace.

    Matrix and Gram are divided by it, or its square, and rounded to the dtype, which saves a Gram matrix.
    The record's six maps diverge above a singular value of 0.9526, and its margin of 1.05 stops at 0.9524: in bf16 a
    matrix within about 1 % of rank one may come out huge. A margin of 1.055 prevents that.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    gram = (x_xt_plain if plain_kernels else x_xt)(matrices.mT if tall else matrices)
    wide_dtype = torch.promote_types(matrices.dtype, torch.float32)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1, dtype=wide_dtype).view(-1, 1, 1)
    divisor = trace.sqrt() * norm_margin + NORM_FLOOR
    x = (matrices / divisor).to(matrices.dtype)
    return odd_polynomials(x, (gram / divisor.square()).to(matrices.dtype), coefficients, plain_kernels)


def anvil_update(
    weight: Tensor,  # (n, rows, columns), changed in place
    gradient: Tensor,  # the same shape
    fast: Tensor,  # the same shape, fp32, changed in place
    slow: Tensor,  # likewise
    second_moment: Tensor,  # see reduce_variance
    mantissa: Tensor | None,  # int16, the weight's shape, changed in place; None for fp32 weights
    mu: Tensor,  # () fp32, as the next two: see blended_momentum
    fast_beta: Tensor,
    fast_share: Tensor,
    step_size: Tensor,  # (n, 1, 1) fp32
    decay: Tensor,  # () fp32
    slow_beta: float,
    beta2: float,
    coefficients: Sequence[tuple[float, float, float]],
    norm_margin: float,
    plain_kernels: bool = False,
) -> None:
    """One step: blended momentum, Polar Express in the weight's dtype, variance reduction, update and decay."""
    x = blended_momentum(gradient, fast, slow, mu, fast_beta, fast_share, slow_beta).to(weight.dtype)
    x = polar_express_by_gram(x, coefficients, norm_margin, plain_kernels)
    x = reduce_variance(x, second_moment, beta2)
    apply_update(weight, mantissa, x, slow, step_size, decay)
