"""Some columns of a matrix, as record 92's head reads its candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ChosenColumns(torch.autograd.Function):
    """`matrix[:, columns]`, (D, C), of (D, V), for distinct columns.

    place: (V,) int64, where each column of the matrix is among the chosen ones, or -1.

    Autograd adds each column's gradient to zeros, (D, V), in three passes, the last of them by single elements. This
    one writes each element of (D, V) once: what stands at its place, or 0.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, columns: Tensor, place: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(place)
        return matrix.index_select(1, columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The matrix's gradient, (D, V)."""
        (place,) = ctx.saved_tensors
        return torch.where(place >= 0, gradient.index_select(1, place.clamp(min=0)), 0), None, None


def chosen_columns(matrix: Tensor, columns: Tensor, place: Tensor) -> Tensor:
    """`ChosenColumns`."""
    chosen: Tensor = ChosenColumns.apply(matrix, columns, place)
    return chosen
