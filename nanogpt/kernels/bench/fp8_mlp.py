"""Timing the MLP in 8-bit floats."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

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
)


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """The forward pass, its first product and the backward pass for D = 768 and F = 3,072 at the record's
    micro-batches, on Hopper; the first two also as 8-bit gradients need them, the last against bf16's.

    FP8 products count half their operations, since the machine's rate is for bf16. The gradient's scale is given:
    compiled code measures it where it makes the gradient.
    """
    width, hidden = 768, 3_072
    up, down = ((0.03 * torch.randn(hidden, width, device=device)).bfloat16() for _ in range(2))
    if not runs_kernel(up, needs=NEEDS):
        return
    from nanogpt.kernels.fp8_head_triton import paired_transpose, quantize_both_ways
    from nanogpt.kernels.fp8_mlp_triton import quantize, up_squared_and_quantized

    up_scale, down_scale = current_scale(up), current_scale(down)
    up8, down8_t = to_e4m3(up / up_scale), to_e4m3(down / down_scale)
    up8_t, down8 = up8.mT.contiguous(), down8_t.mT.contiguous()
    post_scale = torch.full((), 0.01, device=device)
    for tokens in (16_384, 32_768, 49_152):
        u = torch.randn(tokens, width, device=device).bfloat16()
        u_scale = current_scale(u)
        u8 = quantize(u, u_scale)
        inputs = (u, u_scale, up8, up_scale, down8, down_scale, post_scale, u.dtype)
        shape = f"{tokens:,} x {width} x {hidden:,}"
        product = 2 * tokens * width * hidden / 2
        narrow, broad, weights = tokens * width, tokens * hidden, hidden * width  # numbers, also bytes of 8-bit ones
        for suffix, keep8, square8 in (
            ("", False, False),
            (", transposed copies", True, False),
            (", all that is kept in 8 bits", True, True),
        ):
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
        yield BenchCase(
            "rounding to 8 bits, both layouts",
            f"{tokens:,} x {width}",
            functools.partial(quantize_both_ways, u, u_scale, paired=True),
            None,
            flops=0,
            bytes=(2 + 1 + 1) * narrow,
        )
        yield BenchCase(
            "8-bit transpose, tokens paired",
            f"{tokens:,} x {width}",
            functools.partial(paired_transpose, u8),
            None,
            flops=0,
            bytes=(1 + 1) * narrow,
        )
        grad = (1e-4 * torch.randn(tokens, width, device=device)).bfloat16()
        grad_scale = gradient_scale(grad)
        _, post, *_ = _forward(*inputs, True, False, False)
        weights8 = (up8_t, up_scale, down8_t, down_scale)
        in_bf16 = functools.partial(_gradients, grad, u, post, up, down, plain=False)
        for suffix, square8 in (("", False), (", the square too", True)):
            _, square, _, *kept8 = _forward(*inputs, True, square8, False)
            yield BenchCase(
                f"8-bit relu^2 MLP, backward{suffix}",
                shape,
                functools.partial(_gradients8, grad, grad_scale, square, *weights8, u_scale, *kept8, False),
                in_bf16,
                flops=4 * product,
                bytes=(2 * 2 + 1) * narrow + (2 - square8 + 1) * broad + (2 + 2 * 2) * weights,
            )
