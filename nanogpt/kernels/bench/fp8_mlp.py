"""Timing the MLP in 8-bit floats."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.dispatch import runs_kernel
from nanogpt.kernels.fp8_mlp import (
    NEEDS,
    _forward,
    _gradients,
    _gradients8,
    current_scale,
    gradient_scale,
    to_e4m3,
    to_e5m2,
)
from nanogpt.kernels.transpose import transposed_8bit_plain

WIDTH = 768
Form = tuple[str, bool, bool]  # what is kept: transposed copies in 8 bits, and the square in 8 bits alone
FORMS: tuple[Form, ...] = (
    ("", False, False),
    ("transposed copies", True, False),
    ("all that is kept in 8 bits", True, True),
)


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """The forward pass, its first product, the backward pass and its first product at the record's micro-batches, on
    Hopper: for D = 768 and F = 3,072 in all three forms, and for record 92's F = 2,816 with all that is kept in 8 bits.

    FP8 products count half their operations, since the machine's rate is for bf16. The gradient's scale is given:
    compiled code measures it where it makes the gradient. The backward pass's plain equivalent is bf16's.
    """
    if not runs_kernel(torch.empty(1, dtype=torch.bfloat16, device=device), needs=NEEDS):
        return
    from nanogpt.kernels.fp8_head_triton import paired_transpose, quantize_both_ways

    for tokens in (16_384, 32_768, 49_152):
        u = torch.randn(tokens, WIDTH, device=device).bfloat16()
        scale = current_scale(u)
        u8 = to_e4m3(u / scale)
        yield BenchCase(
            "rounding to 8 bits, both layouts",
            f"{tokens:,} x {WIDTH}",
            functools.partial(quantize_both_ways, u, scale, paired=True),
            None,
            flops=0,
            bytes=(2 + 1 + 1) * u.numel(),
        )
        yield BenchCase(
            "8-bit transpose, tokens paired",
            f"{tokens:,} x {WIDTH}",
            functools.partial(paired_transpose, u8),
            None,
            flops=0,
            bytes=(1 + 1) * u.numel(),
        )
        for hidden, forms in ((3_072, FORMS), (2_816, FORMS[-1:])):
            yield from _mlp_cases(u, hidden, forms)


def _mlp_cases(u: Tensor, hidden: int, forms: tuple[Form, ...]) -> Iterator[BenchCase]:
    from nanogpt.kernels.fp8_mlp_triton import gradient_both_ways, up_squared_and_quantized

    (tokens, width), device = u.shape, u.device
    up, down = ((0.03 * torch.randn(hidden, width, device=device)).bfloat16() for _ in range(2))
    up_scale, down_scale = current_scale(up), current_scale(down)
    up8, down8_t = to_e4m3(up / up_scale), to_e4m3(down / down_scale)
    up8_t, down8 = map(transposed_8bit_plain, (up8, down8_t))
    post_scale, u_scale = torch.full((), 0.01, device=device), current_scale(u)
    u8 = to_e4m3(u / u_scale)
    grad = (1e-4 * torch.randn(tokens, width, device=device)).bfloat16()
    grad_scale = gradient_scale(grad)
    grad8 = to_e5m2(grad / grad_scale)
    inputs = (u, u_scale, up8, up_scale, down8, down_scale, post_scale, u.dtype)
    shape = f"{tokens:,} x {width} x {hidden:,}"
    product = 2 * tokens * width * hidden / 2
    narrow, broad, weights = tokens * width, tokens * hidden, hidden * width  # numbers, also bytes of 8-bit ones
    for form, keep8, square8 in forms:
        suffix = form and f", {form}"
        transposed = torch.empty(hidden, tokens, dtype=up8.dtype, device=device) if keep8 else None
        dtype = None if square8 else u.dtype
        yield BenchCase(
            f"8-bit relu^2 MLP, forward{suffix}",
            shape,
            functools.partial(_forward, *inputs, keep8, square8, False),
            functools.partial(_forward, *inputs, keep8, square8, True),
            flops=2 * product,
            bytes=(2 * 2 + keep8) * narrow + (2 - square8 + keep8) * broad + 2 * weights,
        )
        yield BenchCase(
            f"8-bit up-projection and its square{suffix}",
            shape,
            functools.partial(
                up_squared_and_quantized, u8, u_scale, up8, up_scale, post_scale, dtype, transposed=transposed
            ),
            None,
            flops=product,
            bytes=narrow + (1 + 2 * (not square8) + keep8) * broad + weights,
        )
        if not keep8:
            continue
        _, square, _, *kept8 = _forward(*inputs, True, square8, False)
        post = square.to(u.dtype) * post_scale.to(u.dtype) if square8 else square
        yield BenchCase(
            f"8-bit relu^2 MLP, backward{suffix}",
            shape,
            functools.partial(
                _gradients8, grad, grad_scale, square, up8_t, up_scale, down8_t, down_scale, u_scale, *kept8, False
            ),
            functools.partial(_gradients, grad, u, post, up, down, plain=False),
            flops=4 * product,
            bytes=(2 * 2 + 1) * narrow + (2 - square8 + 1) * broad + (2 + 2 * 2) * weights,
        )
        yield BenchCase(
            f"8-bit gradient of the up-projection{suffix}",
            shape,
            functools.partial(gradient_both_ways, grad8, down8_t, down_scale, square, post_scale if square8 else None),
            None,
            flops=product,
            bytes=narrow + (2 - square8 + 2) * broad + weights,
        )
