"""Rows of a table too large for a gradient of its size: reading them with signs, summing their gradients, row Adam.

A token reads R rows (its bigram's and its trigram's), each times a vector of signs, and adds them up. What comes back
is one gradient per token. It is kept as it is until the rows are updated; then each row sums those of its tokens, in
their order: nothing is added atomically, the result is the same every time, and no table-like buffer of fp32 numbers is
cleared, added to and read again.

The rows, signs and row Adam are public record 92's (PR #360), which adds gradients in fp16 by atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.kernels.dispatch import runs_kernel

PLAIN_ROWS = 1 << 18  # rows that the plain path takes at once: each becomes several rows of fp32 numbers


class Signs(NamedTuple):
    """The signs that rows are multiplied by."""

    vectors: Tensor  # (S, D), +1 and -1, of the table's dtype
    rows: Tensor  # (R, T) integers: the vector of each row that is read


class Entries(NamedTuple):
    """m entries, each about one of n rows, grouped by row."""

    sorted: Tensor  # (m,) integers: the entries' rows, sorted
    order: Tensor  # (m,) int64: the entries in that order; a row's entries stay in their own
    starts: Tensor  # (n + 1,) int32: row i's entries are `order[starts[i]:starts[i + 1]]`


class Gradients(NamedTuple):
    """The gradients of m entries: entry e has token `e % T`'s, times its vector of signs if there are any."""

    tokens: Tensor  # (T, D)
    signs: Signs | None = None  # its `rows` have m numbers


class RowAdam(NamedTuple):
    """An update of rows."""

    number: int  # of the update, from 1
    step_size: float
    beta2: float
    decay: float  # as in `nanogpt.optim.adam.adam_update`
    eps: float
    divisor: float  # of the summed gradients: the number of ranks


def read_rows(
    table: Tensor,  # (n, D)
    rows: Tensor,  # (R, T) integers
    signs: Signs | None = None,
    *,
    out: Tensor | None = None,  # (T, D), of the table's dtype
    plain: bool = False,
) -> Tensor:
    """The sum of each token's rows, times their signs: (T, D), rounded once. bf16 on a GPU takes a Triton kernel."""
    if not plain and runs_kernel(table):
        from nanogpt.kernels.table_rows_triton import sum_of_rows_read

        return sum_of_rows_read(table, rows, signs, out)
    read = read_rows_plain(table, rows, signs)
    return read if out is None else out.copy_(read)


def read_rows_plain(table: Tensor, rows: Tensor, signs: Signs | None = None) -> Tensor:
    """`read_rows` in plain PyTorch."""
    parts = F.embedding(rows, table)
    if signs is not None:
        parts = parts * F.embedding(signs.rows, signs.vectors)
    return parts.sum(0)


def entries_of(rows: Tensor, read: Tensor) -> Entries:
    """Which of `read` (m,) are about which of `rows` (n,): sorted, distinct, with everything that is in `read`."""
    ordered, order = torch.sort(read, stable=True)
    starts = torch.searchsorted(ordered, rows.to(ordered.dtype), out_int32=True)
    return Entries(ordered, order, F.pad(starts, (0, 1), value=len(read)))


def sum_rows(entries: Entries, gradients: Gradients, dtype: torch.dtype, *, plain: bool = False) -> Tensor:
    """The sum of each row's gradients, (n, D), in fp32 and rounded once to `dtype`.

    bf16 gradients on a GPU take Triton kernels.
    """
    if not plain and runs_kernel(gradients.tokens):
        from nanogpt.kernels.table_rows_triton import sum_of_entries

        return sum_of_entries(entries, gradients, dtype)
    return sum_rows_plain(entries, gradients).to(dtype)


def sum_rows_plain(entries: Entries, gradients: Gradients) -> Tensor:
    """`sum_rows` in plain PyTorch: (n, D) fp32."""
    tokens, signs = gradients
    count = len(entries.starts) - 1
    total = torch.zeros(count, tokens.shape[1], device=tokens.device)
    index = torch.arange(count, device=tokens.device)
    lengths = entries.starts.diff()
    row_of_each = torch.repeat_interleave(index, lengths, output_size=len(entries.order))
    for order, rows in zip(entries.order.split(PLAIN_ROWS), row_of_each.split(PLAIN_ROWS), strict=True):
        values = tokens[order % len(tokens)]
        if signs is not None:
            values = values * signs.vectors[signs.rows.flatten()[order]]
        total.index_add_(0, rows, values.float())
    return total


def row_adam(
    values: Tensor,  # (rows of the table, D), changed in place
    second_moment: Tensor,  # (rows of the table,) fp32, changed in place
    last_update: Tensor,  # (rows of the table,) int32, changed in place
    owed: Tensor,  # (k,) fp32: by the number of a row's last update, the decay of its moment since
    rows: Tensor,  # (n,) int64, distinct: what is updated
    entries: Entries,
    gradients: Gradients,
    update: RowAdam,
    *,
    plain: bool = False,
) -> None:
    """Update `rows` by the sum of their gradients: Adam without a first moment, and with one second moment per row.

    A bf16 table on a GPU takes Triton kernels, which hold the rows' gradients only in registers.
    """
    if not plain and runs_kernel(values):
        from nanogpt.kernels.table_rows_triton import update_rows

        update_rows(values, second_moment, last_update, owed, rows, entries, gradients, update)
    else:
        row_adam_plain(values, second_moment, last_update, owed, rows, entries, gradients, update)


def row_adam_plain(
    values: Tensor,
    second_moment: Tensor,
    last_update: Tensor,
    owed: Tensor,
    rows: Tensor,
    entries: Entries,
    gradients: Gradients,
    update: RowAdam,
) -> None:
    """`row_adam` in plain PyTorch."""
    total = sum_rows_plain(entries, gradients).div_(update.divisor)
    for places, g in zip(rows.split(PLAIN_ROWS), total.split(PLAIN_ROWS), strict=True):
        moment = second_moment[places] * owed[last_update[places].long()]
        moment = update.beta2 * moment + (1 - update.beta2) * g.square().mean(dim=1)
        second_moment[places] = moment
        last_update[places] = update.number
        change = g.mul_((update.step_size / (moment.sqrt() + update.eps))[:, None])
        weights = values[places].float()
        change = torch.where(change * weights > 0, change + weights * update.decay, change)
        values[places] = (weights - change).to(values.dtype)
