"""The product that makes queries, keys and values in 8-bit floats (e4m3), with fixed scales except for the weights.

From public records 90 (PR #344) and 92 (PR #360). With u (T, D) a norm's output, W (R, D) and s_in the layer's scalar:

    x8 = e4m3(u / s_x), s_x = 8 / 448;  W8 = e4m3(W / s_w), s_w = max|W| / 448 of the current weights
    out = s_x s_w s_in (x8 W8^T)

and backward, g the gradient of out: g8 = e4m3(g / s_g), s_g = 1 / 448, so that entries beyond 1 count as 1;

    u's gradient = s_g s_w s_in (g8 W8);  dW = s_g s_x (g8^T x8);  W's gradient = s_in dW;  s_in's = sum(dW * W)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanogpt.kernels.fp8_mlp import current_scale, scaled_8bit_product, to_e4m3

INPUT_SCALE = 8 / 448
GRADIENT_SCALE = 1 / 448


def fp8_projection(
    u: Tensor,  # (T, D), normalised
    weight: Tensor,  # (R, D)
    scale_in: Tensor,  # () fp32
) -> Tensor:
    """`scale_in * u @ weight.T` by 8-bit products, (T, R) in u's dtype; see the module. T, R, D multiples of 16."""
    out: Tensor = _Fp8Projection.apply(u, weight, scale_in)
    return out


class _Fp8Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, scale_in: Tensor) -> Tensor:
        x8 = to_e4m3(u.float() / INPUT_SCALE)
        weight_scale = current_scale(weight)
        weight8 = to_e4m3(weight.float() / weight_scale)
        ctx.save_for_backward(x8, weight, weight8, weight_scale, scale_in)
        ctx.dtype = u.dtype
        return scaled_8bit_product(x8, _of(INPUT_SCALE, u), weight8, weight_scale * scale_in, u.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x8, weight, weight8, weight_scale, scale_in = ctx.saved_tensors
        grad8 = to_e4m3(grad.float() / GRADIENT_SCALE)
        grad_scale, x_scale = _of(GRADIENT_SCALE, grad), _of(INPUT_SCALE, grad)
        scale = weight_scale * scale_in
        grad_u = scaled_8bit_product(grad8, grad_scale, _transposed(weight8), scale, ctx.dtype, fast=False)
        grad_w = scaled_8bit_product(_transposed(grad8), grad_scale, _transposed(x8), x_scale, weight.dtype, fast=False)
        return grad_u, (scale_in * grad_w).to(weight.dtype), (grad_w.float() * weight.float()).sum()


def _of(scale: float, like: Tensor) -> Tensor:
    return torch.full((), scale, device=like.device)


def _transposed(matrix8: Tensor) -> Tensor:
    """The contiguous transpose, as bytes, since not every device can copy strided 8-bit floats."""
    return matrix8.view(torch.uint8).mT.contiguous().view(matrix8.dtype)
