"""Triton kernels around the MLP's 8-bit products: numbers are rounded, squared and measured in one pass over them."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = tl.constexpr(448.0)
BLOCK = 8192  # numbers of a program


@triton.jit
def _quantize_mlp_kernel(x_ptr, scale_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=0.0).to(tl.float32) / tl.load(scale_ptr)
    x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=place < count)


@triton.jit
def _relu_square_quantize_kernel(pre_ptr, scale_ptr, post_ptr, post8_ptr, peak_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    root = tl.maximum(tl.load(pre_ptr + place, mask=place < count, other=0.0).to(tl.float32), 0.0)
    post = (root * root).to(post_ptr.dtype.element_ty)
    tl.store(post_ptr + place, post, mask=place < count)
    wide = post.to(tl.float32)
    tl.store(peak_ptr + tl.program_id(0), tl.max(wide))
    small = tl.minimum(wide / tl.load(scale_ptr), E4M3_MAX)
    tl.store(post8_ptr + place, small.to(post8_ptr.dtype.element_ty), mask=place < count)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """e4m3 of `x / scale`, cut off at 448. x contiguous, scale () fp32."""
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _quantize_mlp_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, scale, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out


def square_and_quantize(pre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`relu(pre)^2` in pre's dtype, its e4m3 after division by `scale`, and its largest, () fp32. pre contiguous."""
    programs = triton.cdiv(pre.numel(), BLOCK)
    post, post8 = torch.empty_like(pre), torch.empty_like(pre, dtype=torch.float8_e4m3fn)
    peaks = torch.empty(programs, dtype=torch.float32, device=pre.device)
    _relu_square_quantize_kernel[(programs,)](pre, scale, post, post8, peaks, pre.numel(), BLOCK=BLOCK, num_warps=8)
    return post, post8, peaks.amax()
