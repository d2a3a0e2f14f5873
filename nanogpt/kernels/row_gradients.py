"""Gradients of an embedding, added to the table's row by row: rows that a micro-batch has not read are not touched.

Autograd makes the gradient of a lookup as large as the table, fills it with zeros, adds the tokens' rows to it and then
adds all of it to `.grad`. The speedrun's tables have 425 M numbers; a micro-batch reads a few per cent of them.

The kernel takes rows in the order of a sort, so that a row's tokens are neighbours: each sum is made in fixed order, in
fp32, added to the table's row and rounded once. Nothing is added atomically, and the result is the same every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.kernels.dispatch import runs_kernel


class RowOrder(NamedTuple):
    """The rows that tokens have read: in the tokens' order, and sorted, with the token of each sorted row."""

    rows: Tensor  # (T,) integers
    sorted: Tensor  # (T,) integers
    tokens: Tensor  # (T,) int64


def row_order(rows: Tensor) -> RowOrder:
    """Sort `rows` (T,). Equal rows stay in the order of their tokens."""
    ordered, tokens = torch.sort(rows, stable=True)
    return RowOrder(rows, ordered, tokens)


def add_rows(
    table: Tensor,  # (n, D), changed in place
    order: RowOrder,
    grads: Tensor,  # (T, D), of the table's dtype
    *,
    plain: bool = False,
) -> None:
    """`table[row] += sum of the grads of its tokens`, for each row in `order`; other rows stay as they are.

    bf16 on a GPU takes the Triton kernels, where D is a multiple of 16.
    """
    if not plain and runs_kernel(table, grads) and table.shape[1] % 16 == 0:
        from nanogpt.kernels.row_gradients_triton import add_sorted_rows

        add_sorted_rows(table, order.sorted, order.tokens, grads.contiguous())
    else:
        add_rows_plain(table, order, grads)


def add_rows_plain(table: Tensor, order: RowOrder, grads: Tensor) -> None:
    """`add_rows` in plain PyTorch; the sum in at least fp32, rounded once."""
    wide = torch.promote_types(table.dtype, torch.float32)
    total = torch.ops.aten.embedding_dense_backward(grads.to(wide), order.rows, table.shape[0], -1, False)
    table.add_(total)
