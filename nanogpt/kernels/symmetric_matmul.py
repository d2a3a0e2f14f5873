"""Matrix products whose result is symmetric: X X^T, and b A + c A A for symmetric A (Polar Express)."""

from __future__ import annotations

import torch
from torch import Tensor


def x_xt_plain(x: Tensor, out: Tensor | None = None) -> Tensor:
    """X X^T in plain PyTorch. x (batch, m, n), any strides; returns (batch, m, m), in `out` where given."""
    return torch.bmm(x, x.mT) if out is None else torch.bmm(x, x.mT, out=out)


def ba_plus_caa_plain(a: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """`b A + c A A` in plain PyTorch. a (batch, m, m), symmetric; returns the same shape, in `out` where given."""
    return torch.baddbmm(a, a, a, beta=b, alpha=c) if out is None else torch.baddbmm(a, a, a, beta=b, alpha=c, out=out)


def x_xt(x: Tensor, out: Tensor | None = None) -> Tensor:
    """X X^T. x (batch, m, n), any strides (pass `x.mT` for X^T X); returns (batch, m, m), in `out` where given."""
    return x_xt_plain(x, out)


def ba_plus_caa(a: Tensor, b: float, c: float, out: Tensor | None = None) -> Tensor:
    """`b A + c A A`. a (batch, m, m), symmetric; returns the same shape, in `out` (not `a` itself) where given."""
    return ba_plus_caa_plain(a, b, c, out)
