"""Timing what lies between the 8-bit product of queries, keys and values and attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt.gpus import FP8
from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.dispatch import runs_kernel
from nanogpt.kernels.packed_qkv import (
    Rotation,
    norm_and_rotate,
    packed_gradient,
    packed_gradient_plain,
    transposed_8bit,
)

HEADS, WIDTH, ROTATED = 6, 768, 64
ROWS = (1_536, 1_152, 2_304)  # of packed queries, keys and values


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """Both ways at record 92's shapes and micro-batches, and the transposes for the weight's gradient.

    The backward pass's error is e4m3's: 0.026.
    """
    for tokens in (16_384, 49_152):
        angle = 2 * torch.pi * torch.rand(2 * tokens, ROTATED // 2, device=device)
        cos = angle.cos().repeat_interleave(2, dim=1).bfloat16()
        sin = torch.stack((angle.sin(), -angle.sin()), dim=-1).flatten(1).bfloat16()
        if not runs_kernel(cos, needs=FP8):
            return
        for kind, channels, values in (("paired", 64, 128), ("half values", 64, 64), ("wide, shifted", 128, 128)):
            widths = 2 * channels, channels, channels, values
            qk, dq, dk, dv = (torch.randn(tokens, HEADS, n, device=device).bfloat16() for n in widths)
            rotation = Rotation(cos, sin, kind == "paired", kind == "wide, shifted", 2.0**-23)
            inputs = 0.1 * dq, 0.1 * dk, 0.1 * dv, qk.flatten(1)
            positions = (2 if rotation.paired else 1) * tokens
            tables = 2 * positions * ROTATED * cos.itemsize
            forward = functools.partial(norm_and_rotate, inputs[3], rotation, heads=HEADS)
            backward = functools.partial(packed_gradient, *inputs, rotation, factor=448.0)
            shape = f"{tokens:,} x {HEADS} x ({channels}, {values}), {kind}"
            yield BenchCase(
                "packed QKV, norm and rotary",
                shape,
                forward,
                functools.partial(forward, plain=True),
                flops=0,
                bytes=2 * qk.nbytes + tables,
                error=functools.partial(_forward_error, inputs[3], rotation),
            )
            yield BenchCase(
                "packed QKV, gradient in 8 bits",
                shape,
                backward,
                functools.partial(backward, plain=True),
                flops=0,
                bytes=qk.nbytes + 3 * (dq.nbytes + dk.nbytes + dv.nbytes) // 2 + tables,
                error=functools.partial(_backward_error, *inputs, rotation),
            )
        for name, columns in (("input", WIDTH), *(("gradient", columns) for columns in ROWS)):
            matrix8 = torch.randn(tokens, columns, device=device).to(torch.float8_e4m3fn)
            yield BenchCase(
                f"packed QKV, 8-bit transpose of the {name}, tokens paired",
                f"{tokens:,} x {columns:,}",
                functools.partial(transposed_8bit, matrix8),
                functools.partial(transposed_8bit, matrix8, plain=True),
                flops=0,
                bytes=2 * matrix8.nbytes,
            )


def _forward_error(qk: Tensor, rotation: Rotation) -> float:
    exact = norm_and_rotate(qk.double(), _wide(rotation), heads=HEADS)
    return _relative_error(norm_and_rotate(qk, rotation, heads=HEADS), exact)


def _backward_error(dq: Tensor, dk: Tensor, dv: Tensor, qk: Tensor, rotation: Rotation) -> float:
    exact = packed_gradient_plain(dq.double(), dk.double(), dv.double(), qk.double(), _wide(rotation))
    exact = (448 * exact).clamp(-448, 448)
    return _relative_error(packed_gradient(dq, dk, dv, qk, rotation, factor=448.0), exact)


def _wide(rotation: Rotation) -> Rotation:
    return rotation._replace(cos=rotation.cos.double(), sin=rotation.sin.double())


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
