"""Queries, keys and values by a product in 8-bit floats (e4m3), with fixed scales except for the weights.

From public records 90 (PR #344) and 92 (PR #360). With u (T, D) a norm's output, W (R, D) the layer's weights of q, k
and v packed, and s_in its scalar:

    x8 = e4m3(u / s_x), s_x = 8 / 448;  W8 = e4m3(W / s_w), s_w = max|W| / 448 of the current weights
    q, k, v = s_x s_w s_in (x8 W8^T), q and k then normalised and rotated (`nanogpt.kernels.packed_qkv`)

and backward, g the gradient of the product: g8 = e4m3(g / s_g), s_g = 1 / 448, so that entries beyond 1 count as 1;

    u's gradient = s_g s_w s_in (g8 W8);  dW = s_g s_x (g8^T x8);  W's gradient = s_in dW;  s_in's = sum(dW * W)

The weights are rounded once a step, in the layouts of both products that read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.kernels.fp8_mlp import round_matrices, scale_of, scaled_8bit_product, to_e4m3
from nanogpt.kernels.packed_qkv import Rotation, norm_and_rotate, packed_gradient, transposed_8bit
from nanogpt.layers.norm import EPS
from nanogpt.layers.rotary import Rotary

INPUT_SCALE = 8 / 448
GRADIENT_SCALE = 1 / 448


class Fp8Qkv(nn.Module):
    """The 8-bit copies of all layers' weights, by slot of the bank, and what they make.

    groups: (layers, R) for each run of slots with weights of one shape. With `active` False it holds and computes
    nothing. Nothing of it is saved: all follows from the weights.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], *, width: int, active: bool, plain: bool):
        super().__init__()
        self.active = active
        self.plain = plain
        self.places = [(group, i) for group, (layers, _) in enumerate(groups) for i in range(layers)]
        if not active:
            return
        for group, (layers, rows) in enumerate(groups):
            for kind, shape in (("same", (layers, rows, width)), ("transposed", (layers, width, rows))):
                self.register_buffer(f"{kind}_{group}", torch.zeros(shape, dtype=torch.float8_e4m3fn), persistent=False)
            for i in range(layers):  # tensors of their own, aligned as 8-bit products need them
                self.register_buffer(f"scale_{group}_{i}", torch.ones(()), persistent=False)

    @torch.no_grad()
    def round(self, weights: Sequence[Tensor]) -> None:
        """Make the 8-bit copies of the current weights: of each group (layers, R, D)."""
        for group, matrices in enumerate(weights):
            scale = scale_of(torch.linalg.vector_norm(matrices, math.inf, (1, 2)))
            own = [getattr(self, f"scale_{group}_{i}") for i in range(len(matrices))]
            torch._foreach_copy_(own, list(scale.unbind()))
            same, transposed = getattr(self, f"same_{group}"), getattr(self, f"transposed_{group}")
            round_matrices(matrices, scale, same, transposed, plain=self.plain)

    def forward(
        self,
        slot: int,
        u: Tensor,  # (T, D), normalised; T and D multiples of 16
        weight: Tensor,  # (R, D), that of `slot`, which takes the gradient
        scale_in: Tensor,  # () fp32
        rotary: Rotary,
        *,
        heads: int,
        channels: int,  # of a head's queries
        paired: bool,
        shifted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys as attention takes them, (T, heads, channels), and values (T, heads, E), in u's dtype."""
        group, i = self.places[slot]
        kinds = getattr(self, f"same_{group}")[i], getattr(self, f"transposed_{group}")[i]
        scale = getattr(self, f"scale_{group}_{i}")
        rotation = Rotation(rotary.cos, rotary.signed_sin, paired, shifted, EPS)
        q, k, v = _Fp8Qkv.apply(u, weight, scale_in, *kinds, scale, *rotation, heads, channels, self.plain)
        return q, k, v


class _Fp8Qkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        scale_in: Tensor,
        weight8: Tensor,
        weight8_t: Tensor,
        weight_scale: Tensor,
        cos: Tensor,
        sin: Tensor,
        paired: bool,
        shifted: bool,
        eps: float,
        heads: int,
        channels: int,
        plain: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.rest, ctx.plain = (paired, shifted, eps), plain
        x8 = to_e4m3(u.float() / INPUT_SCALE)
        # Two products: values apart from the others are dense, as paired heads need them.
        x_scale, scale = _of(INPUT_SCALE, u), weight_scale * scale_in
        qk, v = (
            scaled_8bit_product(x8, x_scale, part, scale, u.dtype, fast=True)
            for part in weight8.tensor_split((2 * heads * channels,))
        )
        rotation = Rotation(cos, sin, paired, shifted, eps)
        q, k = norm_and_rotate(qk, rotation, heads=heads, plain=plain).unbind()
        ctx.save_for_backward(x8, weight, weight8_t, weight_scale, scale_in, qk, cos, sin)
        return q, k, v.view(len(v), heads, -1)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x8, weight, weight8_t, weight_scale, scale_in, qk, cos, sin = ctx.saved_tensors
        rotation = Rotation(cos, sin, *ctx.rest)
        grad8 = packed_gradient(dq, dk, dv, qk, rotation, factor=1 / GRADIENT_SCALE, plain=ctx.plain)
        grad_scale, x_scale = _of(GRADIENT_SCALE, dq), _of(INPUT_SCALE, dq)
        scale = weight_scale * scale_in
        grad8_t, x8_t = (transposed_8bit(matrix, plain=ctx.plain) for matrix in (grad8, x8))
        grad_u = scaled_8bit_product(grad8, grad_scale, weight8_t, scale, dq.dtype, fast=False)
        grad_w = scaled_8bit_product(grad8_t, grad_scale, x8_t, x_scale, weight.dtype, fast=False)
        grad_scale_in = (grad_w.float() * weight.float()).sum()
        return grad_u, (scale_in * grad_w).to(weight.dtype), grad_scale_in, *[None] * 11


def _of(scale: float, like: Tensor) -> Tensor:
    return torch.full((), scale, device=like.device)
