"""Polar Express (Amsel et al., 2025): a matrix's orthogonal factor, from a few odd polynomials of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt.kernels.symmetric_matmul import ba_plus_caa, ba_plus_caa_plain, x_xt, x_xt_plain

NORM_FLOOR = 1e-6


def polar_express(
    matrices: Tensor,  # (n, rows, columns), bf16 or wider
    coefficients: Sequence[tuple[float, float, float]],
    norm_margin: float,
    plain_kernels: bool = False,
) -> Tensor:
    """Replace each matrix's singular values by approximately 1; shape and dtype as given.

    X = G / (norm_margin ||G||_F + 1e-6); then for each (a, b, c): A = X X^T, X <- a X + (b A + c A A) X, on the
    smaller side. A zero matrix stays zero.
    """
    wide_dtype = torch.promote_types(matrices.dtype, torch.float32)
    length = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=wide_dtype)
    x = (matrices / (length * norm_margin + NORM_FLOOR)).to(matrices.dtype)
    return odd_polynomials(x, None, coefficients, plain_kernels)


def odd_polynomials(
    x: Tensor,  # (n, rows, columns)
    gram: Tensor | None,  # (n, m, m), with m the smaller side: X X^T or X^T X, if already known
    coefficients: Sequence[tuple[float, float, float]],
    plain_kernels: bool = False,
) -> Tensor:
    """For each (a, b, c), X <- a X + (b A + c A A) X with X's Gram matrix A, on the smaller side."""
    tall = x.shape[-2] > x.shape[-1]
    product, polynomial_of = (x_xt_plain, ba_plus_caa_plain) if plain_kernels else (x_xt, ba_plus_caa)
    for a, b, c in coefficients:
        polynomial = polynomial_of(product(x.mT if tall else x) if gram is None else gram, b, c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
        gram = None
    return x
