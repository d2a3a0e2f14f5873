"""Matrix products whose result is symmetric: X X^T, and b A + c A A for symmetric A (Polar Express).

On Hopper and newer only the tiles on and above the diagonal are computed, each stored twice: 21 of 36 for 768 x 768.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanogpt.gpus import Needs
from nanogpt.kernels.dispatch import runs_kernel

NEEDS = Needs((9, 0), shared=98_384)


def x_xt_plain(x: Tensor, out: Tensor | None = None) -> Tensor:
    """X X^T in plain PyTorch. x (batch, m, n), any strides; returns (batch, m, m), in `out` where given."""
    return torch.bmm(x, x.mT) if out is None else torch.bmm(x, x.mT, out=out)


def ba_plus_caa_plain(a: Tensor, b: float, c: float, out: Tensor | None = None, *, diagonal: float = 0.0) -> Tensor:
    """`diagonal I + b A + c A A` in plain PyTorch. a (batch, m, m), symmetric; returns its shape, in `out` if given."""
    result = (
        torch.baddbmm(a, a, a, beta=b, alpha=c) if out is None else torch.baddbmm(a, a, a, beta=b, alpha=c, out=out)
    )
    if diagonal != 0:
        result.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return result


def x_xt(x: Tensor, out: Tensor | None = None) -> Tensor:
    """X X^T. x (batch, m, n), any strides (pass `x.mT` for X^T X); returns (batch, m, m), in `out` where given.

    bf16 on Hopper or newer takes the Triton kernel where m and n are multiples of 8 and x or x.mT is contiguous.
    """
    if not _runs_kernel(x) or (out is not None and not out.is_contiguous()):
        return x_xt_plain(x, out)
    if out is None:
        return _x_xt(x)
    _x_xt_out(x, out)
    return out


def ba_plus_caa(a: Tensor, b: float, c: float, out: Tensor | None = None, *, diagonal: float = 0.0) -> Tensor:
    """`diagonal I + b A + c A A`. a (batch, m, m), symmetric; returns the same shape, in `out` (not `a`) where given.

    With `diagonal` d, `(d I + B) X` is one plain product instead of `d X + B X`, which cuBLAS computes with a copy; and
    where d and the diagonal of B cancel (as they do near orthogonality), their sum rounds finer than B alone.

    bf16 on Hopper or newer takes the Triton kernel where m is a multiple of 8 and a is contiguous.
    """
    if not _runs_kernel(a) or not a.is_contiguous() or (out is not None and not out.is_contiguous()):
        return ba_plus_caa_plain(a, b, c, out, diagonal=diagonal)
    if out is None:
        return _ba_plus_caa(a, b, c, diagonal)
    _ba_plus_caa_out(a, b, c, diagonal, out)
    return out


def _runs_kernel(x: Tensor) -> bool:
    return (
        runs_kernel(x, needs=NEEDS)
        and x.shape[1] % 8 == 0
        and x.shape[2] % 8 == 0
        and (x.is_contiguous() or x.mT.is_contiguous())
    )


def _launch(x: Tensor, a: Tensor | None, b: float, c: float, d: float, out: Tensor) -> None:
    from nanogpt.kernels.symmetric_matmul_triton import config_for, symmetric_product

    symmetric_product(x, a, b, c, d, out, config_for(x))


@torch.library.custom_op("nanogpt::x_xt_out", mutates_args={"out"})
def _x_xt_out(x: Tensor, out: Tensor) -> None:
    _launch(x, None, 0.0, 1.0, 0.0, out)


@torch.library.custom_op("nanogpt::x_xt", mutates_args=())
def _x_xt(x: Tensor) -> Tensor:
    out = x.new_empty((x.shape[0], x.shape[1], x.shape[1]))
    _launch(x, None, 0.0, 1.0, 0.0, out)
    return out


@_x_xt.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], x.shape[1]))


@torch.library.custom_op("nanogpt::ba_plus_caa_out", mutates_args={"out"})
def _ba_plus_caa_out(a: Tensor, b: float, c: float, d: float, out: Tensor) -> None:
    _launch(a, a, b, c, d, out)


@torch.library.custom_op("nanogpt::ba_plus_caa", mutates_args=())
def _ba_plus_caa(a: Tensor, b: float, c: float, d: float) -> Tensor:
    out = a.new_empty(a.shape)
    _launch(a, a, b, c, d, out)
    return out


@_ba_plus_caa.register_fake
def _(a: Tensor, b: float, c: float, d: float) -> Tensor:
    return a.new_empty(a.shape)
