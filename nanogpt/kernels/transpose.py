"""Transposed copy and transposed add, for a head and an embedding that share their weight."""

from __future__ import annotations

from torch import Tensor


def transpose_copy(src: Tensor, dst: Tensor) -> None:
    """`dst = src.T` in place. src (m, n), dst (n, m)."""
    dst.copy_(src.mT)


def transpose_add(src: Tensor, dst: Tensor) -> None:
    """`dst += src.T` in place. src (m, n), dst (n, m)."""
    dst.add_(src.mT)
