"""Transposed copy and add, for a head and an embedding that share their weight; and the plain transpose of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from nanogpt.kernels.dispatch import runs_kernel


def transpose_copy_plain(src: Tensor, dst: Tensor) -> None:
    """`dst = src.T` in place, in plain PyTorch. src (m, n), dst (n, m)."""
    dst.copy_(src.mT)


def transpose_add_plain(src: Tensor, dst: Tensor) -> None:
    """`dst += src.T` in place, in plain PyTorch. src (m, n), dst (n, m)."""
    dst.add_(src.mT)


def transposed_8bit_plain(matrix8: Tensor) -> Tensor:
    """The contiguous transpose of an 8-bit matrix: as bytes, since not every device can copy strided 8-bit floats."""
    return matrix8.view(torch.uint8).mT.contiguous().view(matrix8.dtype)


def transpose_copy(src: Tensor, dst: Tensor) -> None:
    """`dst = src.T` in place. src (m, n), dst (n, m). Not differentiable on the kernel's path (bf16 on a GPU)."""
    if _runs_kernel(src, dst):
        _transpose_copy(src, dst)
    else:
        transpose_copy_plain(src, dst)


def transpose_add(src: Tensor, dst: Tensor) -> None:
    """`dst += src.T` in place. src (m, n), dst (n, m). Not differentiable on the kernel's path (bf16 on a GPU)."""
    if _runs_kernel(src, dst):
        _transpose_add(src, dst)
    else:
        transpose_add_plain(src, dst)


def _runs_kernel(src: Tensor, dst: Tensor) -> bool:
    return runs_kernel(src, dst) and src.is_contiguous() and dst.is_contiguous()


@torch.library.custom_op("nanogpt::transpose_copy", mutates_args={"dst"})
def _transpose_copy(src: Tensor, dst: Tensor) -> None:
    from nanogpt.kernels.transpose_triton import transpose_into

    transpose_into(src, dst, False)


@torch.library.custom_op("nanogpt::transpose_add", mutates_args={"dst"})
def _transpose_add(src: Tensor, dst: Tensor) -> None:
    from nanogpt.kernels.transpose_triton import transpose_into

    transpose_into(src, dst, True)
