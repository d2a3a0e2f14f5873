"""The squared-ReLU MLP with both products in 8-bit floats (e4m3), and the backward pass in bf16 or in 8 bits too.

    up:    x8 = e4m3(u / s_x), s_x = max|u| / 448 of this input;  pre = s_x s_u (x8 U8^T)
    post = relu(pre)^2, rounded to u's dtype
    down:  h8 = e4m3(min(post / s_h, 448));  out = s_h s_w (h8 W8)

s_u is for the current weights. s_h and s_w are delayed: they come from what was measured one micro-batch, or one step,
earlier (`nanogpt.layers.fp8_mlp` keeps them), so that nothing has to be read twice. s_x may be given where u is
bounded: e4m3 has an exponent, so a larger scale costs only values close to zero, and a compiler can round u where
it makes it. On Hopper the square and its rounding are the epilogue of the first product, both products accumulate fast,
and h8 comes from the square before it is rounded. On a CPU the same roundings are made around ordinary products,
which round pre as well.

With 8-bit gradients, g the gradient of out:

    g8 = e5m2(g / s_g), s_g = max|g| / 16 of this gradient;  d = 2 sqrt(post) * s_g s_w (g8 W8^T)
    d8 = e5m2(d / s_g);  u's gradient = s_g s_u (d8 U8)
    U's gradient = s_g s_x (d8^T u8);  W's gradient = s_h s_g (h8^T g8)

One scale serves g and d, so that d need not be measured: e5m2 has 30 binades, and a largest g of 2^4 leaves d room to
be 2^11 times as large, or 2^18 times smaller. The weights' gradients sum over tokens, and 8-bit products want operands
that are contiguous along the sum. So whatever makes d8, u8, h8 and g8 on Hopper writes them transposed as well.
Then nothing but d reads post, which need not be kept either:

    d = 2 sqrt(s_h h8) * s_g s_w (g8 W8^T)

The root halves h8's relative error. Squares beyond 448 s_h count as that much, and those below 2^-10 s_h as nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nanogpt.gpus import FP8, Needs
from nanogpt.kernels.dispatch import runs_kernel
from nanogpt.kernels.fp8_head import scaled_product
from nanogpt.kernels.relu_squared_mlp import relu_squared_backward

NEEDS = Needs((9, 0), end=(10, 0))  # as compiled for sm_100 a tile takes 245,808 bytes of shared memory: none has that
E4M3_MAX = 448.0
E5M2_MAX = 57344.0
PEAK_FLOOR = 1e-12
GRADIENT_PEAK = 16.0  # of e5m2's 57,344: the rest is for gradients that grow on their way through an activation
GRADIENT_FLOOR = 1e-30  # of a gradient's largest; products with a weight's scale are still normal fp32 numbers


def current_scale(values: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """What to divide `values` by so that the largest becomes e4m3's largest, over `dims` (all); fp32."""
    return scale_of(values.abs().amax() if dims is None else values.abs().amax(dims))


def scale_of(peak: Tensor) -> Tensor:
    """What to divide by so that `peak`, not negative, becomes e4m3's largest; its shape, fp32."""
    return peak.float().clamp(min=PEAK_FLOOR) / E4M3_MAX


def gradient_scale(grad: Tensor) -> Tensor:
    """What to divide a gradient (T, D) by so that its largest becomes 16; () fp32."""
    peak = grad.abs().amax(1).float().amax()  # by rows first: a compiler finds those where it makes the rows
    return peak.clamp(min=GRADIENT_FLOOR) / GRADIENT_PEAK


def to_e4m3(values: Tensor) -> Tensor:
    """Rounded to e4m3; larger values become its largest number."""
    return values.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e5m2(values: Tensor) -> Tensor:
    """Rounded to e5m2; larger values become its largest number."""
    return values.float().clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2)


def round_weights(
    bank: Tensor,  # (layers, 2, F, D): up, down
    down_scale: Tensor,  # (layers,) fp32
    up8: Tensor,  # (layers, F, D) e4m3, written, like the next
    down8: Tensor,  # (layers, D, F) e4m3
    transposed8: tuple[Tensor, Tensor] | None = None,  # in the other layout: (layers, D, F) and (layers, F, D)
    *,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """Write the 8-bit weights: up with a scale of its own, down with the one given.

    In fp32; the record computes the up weights' scale and quotient in bf16. Returns the up weights' scale and the
    largest of the down weights, (layers,) fp32 each. Every rank does this after every step: three kernels on a GPU.
    """
    peaks = torch.linalg.vector_norm(bank, math.inf, (2, 3)).float()
    up_scale = scale_of(peaks[:, 0])
    up8_t, down8_t = transposed8 or (None, None)
    round_matrices(bank[:, 0], up_scale, up8, up8_t, plain=plain)
    round_matrices(bank[:, 1], down_scale, down8_t, down8, plain=plain)
    return up_scale, peaks[:, 1]


def round_matrices(
    matrices: Tensor,  # (B, M, N), each contiguous
    scale: Tensor,  # (B,) fp32, to divide by
    same: Tensor | None,  # (B, M, N) e4m3, written, like the next
    transposed: Tensor | None,  # (B, N, M)
    *,
    plain: bool = False,
) -> None:
    """Round to e4m3, in one layout or both."""
    if not plain and runs_kernel(matrices, needs=FP8):
        from nanogpt.kernels.fp8_head_triton import quantize_matrices

        quantize_matrices(matrices, scale, same, transposed)
        return
    rounded = to_e4m3(matrices.float() / scale[:, None, None])
    if same is not None:
        same.copy_(rounded)
    if transposed is not None:  # as bytes: not every device can copy 8-bit floats with strides
        transposed.view(torch.uint8).copy_(rounded.view(torch.uint8).mT)


def fp8_relu_squared_mlp(
    u: Tensor,  # (T, D)
    up: Tensor,  # (F, D)
    down: Tensor,  # (F, D)
    up8: Tensor,  # (F, D) e4m3
    up_scale: Tensor,  # () fp32, like the other scales, each in storage of its own
    down8: Tensor,  # (D, F) e4m3: transposed
    down_scale: Tensor,
    post_scale: Tensor,
    *,
    u_scale: Tensor | None = None,  # measured if None
    transposed8: tuple[Tensor, Tensor] | None = None,  # (D, F), (F, D) e4m3: up8 and down8, transposed
    square8: bool = False,
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """`relu(u @ up.T)**2 @ down` from the 8-bit weights, (T, D), and the largest of relu(u @ up.T)**2, () fp32.

    Differentiable in u, up and down: by products in u's dtype; with `transposed8`, by 8-bit products, and with
    `square8` on top the square is kept in 8 bits only. T, D and F are multiples of 16 on a GPU. `plain`: without
    Triton kernels.

    Raises:
        ValueError: `square8` without `transposed8`.
    """
    if square8 and transposed8 is None:
        raise ValueError("square8 needs transposed8")
    with torch.no_grad():
        if u_scale is None:  # by rows first: a compiler finds those where it makes the rows
            u8, u_scale = None, current_scale(u.abs().amax(1))
        else:
            u8 = to_e4m3(u.float() / u_scale)
    weights8 = (up8, up_scale, down8, down_scale)
    transposed = transposed8 or (None, None)
    out, peak = _Fp8MLP.apply(u, up, down, u8, u_scale, *weights8, post_scale, *transposed, square8, plain)
    return out, peak


class _Fp8MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        up: Tensor,
        down: Tensor,
        u8: Tensor | None,
        u_scale: Tensor,
        up8: Tensor,
        up_scale: Tensor,
        down8: Tensor,
        down_scale: Tensor,
        post_scale: Tensor,
        up8_t: Tensor | None,
        down8_t: Tensor | None,
        square8: bool,
        plain: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.plain, ctx.gradients8 = plain, up8_t is not None
        weights8 = (up8, up_scale, down8, down_scale)
        x = u if u8 is None else u8  # its dtype does not show whether there are kernels for u's
        plain = plain or not runs_kernel(u, needs=NEEDS)
        out, post, peak, *kept = _forward(x, u_scale, *weights8, post_scale, u.dtype, ctx.gradients8, square8, plain)
        ctx.mark_non_differentiable(peak)
        if ctx.gradients8:
            ctx.save_for_backward(post, up8_t, up_scale, down8_t, down_scale, u_scale, *kept)
        else:
            ctx.save_for_backward(u, post, up, down)
        return out, peak

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, Tensor, Tensor]
        if ctx.gradients8:
            gradients = _gradients8(grad, gradient_scale(grad), *ctx.saved_tensors, ctx.plain)
        else:
            gradients = _gradients(grad, *ctx.saved_tensors, plain=ctx.plain)
        return *gradients, *[None] * 11


def _gradients(
    grad: Tensor, u: Tensor, post: Tensor, up: Tensor, down: Tensor, *, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, up and down, all products in u's dtype."""
    grad_pre = relu_squared_backward(grad, down, post, plain=plain)
    return grad_pre @ up, grad_pre.mT @ u, post.mT @ grad


# One opaque operation: whatever a compiler sees of it, it may recompute in the backward pass, when `post_scale` has
# long been overwritten by the next call.
@torch.library.custom_op("nanogpt::fp8_mlp_forward", mutates_args=())
def _forward(
    x: Tensor,  # (T, D): u, or e4m3 of u / u_scale
    u_scale: Tensor,
    up8: Tensor,
    up_scale: Tensor,
    down8: Tensor,
    down_scale: Tensor,
    post_scale: Tensor,
    dtype: torch.dtype,  # of u
    keep8: bool,
    square8: bool,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(the output (T, D), relu(pre)^2 (T, F), its largest, () fp32), and for gradients in 8 bits (e4m3 of u (D, T),
    e4m3 of relu(pre)^2 (F, T), a copy of `post_scale`), which are empty unless `keep8`. With `square8`, the second is
    e4m3 of relu(pre)^2 / post_scale.

    The kernels leave the tokens of these copies, and of those that `_gradients8` makes, in an order of their own.
    """
    rounded = x.dtype == torch.float8_e4m3fn
    u8_t = post8_t = None
    if not plain:
        from nanogpt.kernels.fp8_head_triton import paired_transpose, quantize_both_ways
        from nanogpt.kernels.fp8_mlp_triton import quantize, up_squared_and_quantized

        x = x.contiguous()
        if keep8:
            u8, u8_t = (x, paired_transpose(x)) if rounded else quantize_both_ways(x, u_scale, paired=True)
            post8_t = up8.new_empty((up8.shape[0], x.shape[0]))
        else:
            u8 = x if rounded else quantize(x, u_scale)
        wide = None if square8 else dtype
        post, post8, peak = up_squared_and_quantized(u8, u_scale, up8, up_scale, post_scale, wide, transposed=post8_t)
    else:
        u8 = x if rounded else to_e4m3(x.float() / u_scale)
        pre = scaled_8bit_product(u8, u_scale, up8, up_scale, dtype, fast=False)
        square = pre.relu().square()
        post8, peak = to_e4m3(square.float() / post_scale), square.amax().float()
        post = None if square8 else square
        if keep8:
            u8_t, post8_t = u8.mT.contiguous(), post8.mT.contiguous()
    out = scaled_8bit_product(post8, post_scale, down8, down_scale, dtype, fast=True)
    post = post8 if post is None else post
    if u8_t is None or post8_t is None:
        return out, post, peak, up8.new_empty(0), up8.new_empty(0), post_scale.new_empty(0)
    return out, post, peak, u8_t, post8_t, post_scale.clone()


@_forward.register_fake
def _(
    x: Tensor,
    u_scale: Tensor,
    up8: Tensor,
    up_scale: Tensor,
    down8: Tensor,
    down_scale: Tensor,
    post_scale: Tensor,
    dtype: torch.dtype,
    keep8: bool,
    square8: bool,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (tokens, width), hidden = x.shape, up8.shape[0]
    out = x.new_empty((tokens, width), dtype=dtype)
    post = x.new_empty((tokens, hidden), dtype=up8.dtype if square8 else dtype)
    peak = x.new_empty((), dtype=torch.float32)
    u8_t, post8_t = (up8.new_empty((size, tokens) if keep8 else (0,)) for size in (width, hidden))
    return out, post, peak, u8_t, post8_t, post_scale.new_empty(() if keep8 else (0,))


@torch.library.custom_op("nanogpt::fp8_mlp_backward", mutates_args=())
def _gradients8(
    grad: Tensor,  # (T, D)
    grad_scale: Tensor,
    post: Tensor,  # (T, F)
    up8: Tensor,  # (D, F)
    up_scale: Tensor,
    down8: Tensor,  # (F, D)
    down_scale: Tensor,
    u_scale: Tensor,
    u8_t: Tensor,  # (D, T); this and the next two as `_forward` made them
    post8_t: Tensor,  # (F, T)
    post_scale: Tensor,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u (T, D), up and down (F, D), all by 8-bit products; `post` as it is or as e4m3."""
    square_scale = post_scale if post.dtype == torch.float8_e4m3fn else None
    if not plain and runs_kernel(grad, needs=NEEDS):
        from nanogpt.kernels.fp8_head_triton import quantize_both_ways
        from nanogpt.kernels.fp8_mlp_triton import gradient_both_ways

        grad8, grad8_t = quantize_both_ways(grad.contiguous(), grad_scale, torch.float8_e5m2, paired=True)
        grad_pre8, grad_pre8_t = gradient_both_ways(grad8, down8, down_scale, post.contiguous(), square_scale)
    else:
        square = post if square_scale is None else post.to(u_scale.dtype) * square_scale
        root = square.to(torch.promote_types(square.dtype, torch.float32)).sqrt()
        grad8 = to_e5m2(grad.float() / grad_scale)
        grad_pre = 2 * root * scaled_8bit_product(grad8, grad_scale, down8, down_scale, grad.dtype, fast=False)
        grad_pre8 = to_e5m2(grad_pre.float() / grad_scale)
        grad8_t, grad_pre8_t = grad8.mT.contiguous(), grad_pre8.mT.contiguous()
    grad_u = scaled_8bit_product(grad_pre8, grad_scale, up8, up_scale, grad.dtype, fast=False)
    grad_up = scaled_8bit_product(grad_pre8_t, grad_scale, u8_t, u_scale, grad.dtype, fast=False)
    return grad_u, grad_up, scaled_8bit_product(post8_t, post_scale, grad8_t, grad_scale, grad.dtype, fast=False)


@_gradients8.register_fake
def _(
    grad: Tensor, grad_scale: Tensor, post: Tensor, up8: Tensor, *others: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_up, grad_down = (grad.new_empty((up8.shape[1], up8.shape[0])) for _ in range(2))
    return grad.new_empty(grad.shape), grad_up, grad_down


def scaled_8bit_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """`(a_scale a) (b_scale b)^T` of a (M, K) and b (N, K), 8-bit: (M, N) in `dtype`."""
    if a.is_cuda and dtype == torch.bfloat16:
        return scaled_product(a, a_scale, b, b_scale, out_dtype=dtype, fast=fast)
    wide = torch.promote_types(dtype, torch.float32)
    return ((a.to(wide) @ b.to(wide).mT) * (a_scale * b_scale)).to(dtype)
