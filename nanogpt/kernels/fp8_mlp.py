"""The squared-ReLU MLP with both products in 8-bit floats (e4m3); the backward pass is that of bf16, or half in 8 bits.

    up:    x8 = e4m3(u / s_x), s_x = max|u| / 448 of this very input;  pre = s_x s_u (x8 U8^T)
    post = relu(pre)^2, rounded to u's dtype
    down:  h8 = e4m3(min(post / s_h, 448));  out = s_h s_w (h8 W8)

s_u is of the current weights. s_h and s_w are delayed: they come from what was measured one micro-batch, or one step,
earlier (`nanogpt.layers.fp8_mlp` keeps them), so that nothing has to be read twice. On Hopper the square and its
rounding are the epilogue of the first product, both products accumulate fast, and h8 comes from the square before that
is rounded. On a CPU the same roundings are made around ordinary products, which round pre as well.

With 8-bit gradients of the activations, g the gradient of out:

    g8 = e5m2(g / s_g), s_g = max|g| / 16 of this very gradient;  d = 2 sqrt(post) * s_g s_w (g8 W8^T)
    d8 = e5m2(d / s_g);  u's gradient = s_g s_u (d8 U8)

One scale serves g and d, so that d need not be measured: e5m2 has 30 binades, and a largest g of 2^4 leaves d room to
be 2^11 times as large, or 2^18 times smaller. The gradients of U and W, d^T u and post^T g, stay products in u's dtype,
of d and g that have not been rounded to 8 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanogpt.kernels.benchmark import BenchCase
from nanogpt.kernels.dispatch import runs_kernel
from nanogpt.kernels.fp8_head import scaled_product
from nanogpt.kernels.relu_squared_mlp import relu_squared_backward

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
PEAK_FLOOR = 1e-12
GRADIENT_PEAK = 16.0  # of e5m2's 57,344: the rest is for gradients that grow on their way through an activation
GRADIENT_FLOOR = 1e-30  # of a gradient's largest; products with a weight's scale are still normal fp32 numbers


def current_scale(values: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """What to divide `values` by so that the largest becomes e4m3's largest, over `dims` (all); fp32."""
    peak = values.abs().amax() if dims is None else values.abs().amax(dims)
    return peak.float().clamp(min=PEAK_FLOOR) / E4M3_MAX


def gradient_scale(grad: Tensor) -> Tensor:
    """What to divide a gradient (T, D) by so that its largest becomes 16; () fp32."""
    peak = grad.abs().amax(1).float().amax()  # by rows first: a compiler finds those where it makes the rows
    return peak.clamp(min=GRADIENT_FLOOR) / GRADIENT_PEAK


def to_e4m3(values: Tensor) -> Tensor:
    """Rounded to e4m3; what is too large becomes the largest number that it has."""
    return values.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e5m2(values: Tensor) -> Tensor:
    """Rounded to e5m2; what is too large becomes the largest number that it has."""
    return values.float().clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2)


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
    transposed8: tuple[Tensor, Tensor] | None = None,  # (D, F), (F, D) e4m3: up8 and down8, transposed
    plain: bool = False,
) -> tuple[Tensor, Tensor]:
    """`relu(u @ up.T)**2 @ down` from the 8-bit weights, (T, D), and the largest of relu(u @ up.T)**2, () fp32.

    Differentiable in u, up and down, with the gradients of the products in u's dtype; with `transposed8`, the gradients
    of u and of what is squared come from 8-bit products. T, D and F are multiples of 16 on a GPU. `plain`: no Triton
    kernels.
    """
    with torch.no_grad():  # by rows first: a compiler finds those where it makes the rows
        u_scale = current_scale(u.abs().amax(1))
    weights8 = (up8, up_scale, down8, down_scale)
    out, peak = _Fp8MLP.apply(u, up, down, u_scale, *weights8, post_scale, *(transposed8 or (None, None)), plain)
    return out, peak


class _Fp8MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        up: Tensor,
        down: Tensor,
        u_scale: Tensor,
        up8: Tensor,
        up_scale: Tensor,
        down8: Tensor,
        down_scale: Tensor,
        post_scale: Tensor,
        up8_t: Tensor | None,
        down8_t: Tensor | None,
        plain: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.plain = plain
        ctx.gradients8 = up8_t is not None
        out, post, peak = _forward(u, u_scale, up8, up_scale, down8, down_scale, post_scale, plain)
        ctx.mark_non_differentiable(peak)
        weights = (up, down) if up8_t is None else (up8_t, up_scale, down8_t, down_scale)
        ctx.save_for_backward(u, post, *weights)
        return out, peak

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients8:
            gradients = _gradients8(grad, gradient_scale(grad), *ctx.saved_tensors, plain=ctx.plain)
        else:
            gradients = _gradients(grad, *ctx.saved_tensors, plain=ctx.plain)
        return *gradients, None, None, None, None, None, None, None, None, None


def _gradients(
    grad: Tensor, u: Tensor, post: Tensor, up: Tensor, down: Tensor, *, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, up and down, all products in u's dtype."""
    grad_pre = relu_squared_backward(grad, down, post, plain=plain)
    return grad_pre @ up, grad_pre.mT @ u, post.mT @ grad


def _gradients8(
    grad: Tensor,
    grad_scale: Tensor,
    u: Tensor,
    post: Tensor,
    up8: Tensor,  # (D, F)
    up_scale: Tensor,
    down8: Tensor,  # (F, D)
    down_scale: Tensor,
    *,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of u, up and down, those of activations by 8-bit products."""
    grad_u, grad_pre = _backward(grad, grad_scale, post, up8, up_scale, down8, down_scale, plain)
    return grad_u, grad_pre.mT @ u, post.mT @ grad


# One opaque operation: whatever a compiler sees of it, it may compute again in the backward pass, when `post_scale` has
# long been overwritten by the next call's.
@torch.library.custom_op("nanogpt::fp8_mlp_forward", mutates_args=())
def _forward(
    u: Tensor,
    u_scale: Tensor,
    up8: Tensor,
    up_scale: Tensor,
    down8: Tensor,
    down_scale: Tensor,
    post_scale: Tensor,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(the output (T, D), relu(pre)^2 (T, F), its largest, () fp32)."""
    if not plain and runs_kernel(u, capability=9):
        from nanogpt.kernels.fp8_mlp_triton import quantize, up_squared_and_quantized

        u8 = quantize(u.contiguous(), u_scale)
        post, post8, peak = up_squared_and_quantized(u8, u_scale, up8, up_scale, post_scale, u.dtype)
    else:
        pre = _product(to_e4m3(u.float() / u_scale), u_scale, up8, up_scale, u.dtype, fast=False)
        post = pre.relu().square()
        post8, peak = to_e4m3(post.float() / post_scale), post.amax().float()
    return _product(post8, post_scale, down8, down_scale, u.dtype, fast=True), post, peak


@_forward.register_fake
def _(u: Tensor, u_scale: Tensor, up8: Tensor, *others: Tensor | bool) -> tuple[Tensor, Tensor, Tensor]:
    post = u.new_empty((u.shape[0], up8.shape[0]))
    return torch.empty_like(u, memory_format=torch.contiguous_format), post, u.new_empty((), dtype=torch.float32)


@torch.library.custom_op("nanogpt::fp8_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor,  # (T, D)
    grad_scale: Tensor,
    post: Tensor,  # (T, F)
    up8: Tensor,  # (D, F)
    up_scale: Tensor,
    down8: Tensor,  # (F, D)
    down_scale: Tensor,
    plain: bool,
) -> tuple[Tensor, Tensor]:
    """(the gradient of u (T, D), that before the activation (T, F))."""
    if not plain and runs_kernel(grad, post, capability=9):
        from nanogpt.kernels.fp8_mlp_triton import gradient_and_quantized, quantize

        grad8 = quantize(grad.contiguous(), grad_scale, torch.float8_e5m2)
        grad_pre, grad_pre8 = gradient_and_quantized(grad8, grad_scale, down8, down_scale, post.contiguous())
    else:
        grad8 = to_e5m2(grad.float() / grad_scale)
        root = post.to(torch.promote_types(post.dtype, torch.float32)).sqrt()
        exact = 2 * root * _product(grad8, grad_scale, down8, down_scale, grad.dtype, fast=False)
        grad_pre, grad_pre8 = exact.to(post.dtype), to_e5m2(exact.float() / grad_scale)
    return _product(grad_pre8, grad_scale, up8, up_scale, grad.dtype, fast=False), grad_pre


@_backward.register_fake
def _(grad: Tensor, grad_scale: Tensor, post: Tensor, *others: Tensor | bool) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), post.new_empty(post.shape)


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """`(a_scale a) (b_scale b)^T` of a (M, K) and b (N, K), 8-bit: (M, N) in `dtype`."""
    if a.is_cuda and dtype == torch.bfloat16:
        return scaled_product(a, a_scale, b, b_scale, out_dtype=dtype, fast=fast)
    wide = torch.promote_types(dtype, torch.float32)
    return ((a.to(wide) @ b.to(wide).mT) * (a_scale * b_scale)).to(dtype)


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """The forward pass, its first product, and the backward pass with 8-bit gradients of the activations against that
    of bf16, for D = 768 and F = 3,072 at the record's micro-batches, on Hopper.

    FP8 products count half their operations, since the machine's rate is that of bf16. The gradient's scale is given:
    compiled code measures it where it makes the gradient.
    """
    width, hidden = 768, 3_072
    up, down = ((0.03 * torch.randn(hidden, width, device=device)).bfloat16() for _ in range(2))
    if not runs_kernel(up, capability=9):
        return
    from nanogpt.kernels.fp8_mlp_triton import quantize, up_squared_and_quantized

    up_scale, down_scale = current_scale(up), current_scale(down)
    up8, down8_t = to_e4m3(up / up_scale), to_e4m3(down / down_scale)
    up8_t, down8 = up8.mT.contiguous(), down8_t.mT.contiguous()
    post_scale = torch.full((), 0.01, device=device)
    for tokens in (16_384, 32_768, 49_152):
        u = torch.randn(tokens, width, device=device).bfloat16()
        u_scale = current_scale(u)
        u8 = quantize(u, u_scale)
        inputs = (u, u_scale, up8, up_scale, down8, down_scale, post_scale)
        product = 2 * tokens * width * hidden / 2
        yield BenchCase(
            "8-bit relu^2 MLP, forward",
            f"{tokens:,} x {width} x {hidden:,}",
            functools.partial(_forward, *inputs, False),
            functools.partial(_forward, *inputs, True),
            flops=2 * product,
            bytes=2 * 2 * tokens * width + 2 * tokens * hidden + 2 * hidden * width,
        )
        yield BenchCase(
            "8-bit up-projection and its square",
            f"{tokens:,} x {width} x {hidden:,}",
            functools.partial(up_squared_and_quantized, u8, u_scale, up8, up_scale, post_scale, u.dtype),
            None,
            flops=product,
            bytes=tokens * width + 3 * tokens * hidden + hidden * width,
        )
        grad = (1e-4 * torch.randn(tokens, width, device=device)).bfloat16()
        post = _forward(*inputs, False)[1]
        weights8 = (up8_t, up_scale, down8_t, down_scale)
        yield BenchCase(
            "8-bit relu^2 MLP, backward",
            f"{tokens:,} x {width} x {hidden:,}",
            functools.partial(_gradients8, grad, gradient_scale(grad), u, post, *weights8, plain=False),
            functools.partial(_gradients, grad, u, post, up, down, plain=False),
            flops=2 * product + 2 * 2 * product,
            bytes=2 * 3 * tokens * width + 2 * tokens * hidden + (2 + 2 * 2) * hidden * width,
        )
