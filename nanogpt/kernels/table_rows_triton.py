"""Triton kernels for the rows of a large table; see `nanogpt.kernels.table_rows`.

- A program has one row (or one token), all of its numbers at once: its reads are scattered, so it takes many programs
  of few threads to keep the memory busy.
- A row's entries are summed by its program. Where there are many, as for a frequent n-gram, those of a whole block of
  the sorted entries have been summed before, by a program for each block that belongs to one row.
- Numbers that differ from call to call are not constants of the code: nothing is compiled after the first call.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanogpt.kernels.table_rows import Entries, Gradients, RowAdam, Signs

READ_WARPS = 1
SUM_WARPS = 4
BLOCK = 64  # sorted entries
AT_ONCE = 1  # entries of a row that are in flight at a time: most rows have one or two
BLOCKS_AT_ONCE = 4  # the same for a block


@triton.jit(do_not_specialize=["T"])
def _read_rows_kernel(
    table_ptr,  # (n, D)
    rows_ptr,  # (READS, T)
    signs_ptr,  # (S, D)
    sign_rows_ptr,  # (READS, T)
    out_ptr,  # (T, D)
    T,
    D,
    READS: tl.constexpr,
    SIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < D
    total = tl.zeros((WIDTH,), tl.float32)
    for read in tl.static_range(READS):
        row = tl.load(rows_ptr + read * T + token).to(tl.int64)
        numbers = tl.load(table_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if SIGNED:
            sign = tl.load(sign_rows_ptr + read * T + token).to(tl.int64)
            numbers *= tl.load(signs_ptr + sign * D + column, mask=inside, other=0.0).to(tl.float32)
        total += numbers
    tl.store(out_ptr + token.to(tl.int64) * D + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_entries(
    tokens_ptr,  # (T, D)
    signs_ptr,  # (S, D)
    sign_rows_ptr,  # (m,)
    order_ptr,  # (m,)
    first,
    end,
    T,
    D,
    SIGNED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sum over places `first` to `end` of the order, (WIDTH,) fp32."""
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    while first < end:
        place = first + tl.arange(0, AT_ONCE)
        is_entry = place < end
        chosen = is_entry[:, None] & (column < D)[None, :]
        entry = tl.load(order_ptr + place, mask=is_entry, other=0).to(tl.int32)
        token = (entry % T).to(tl.int64)
        numbers = tl.load(tokens_ptr + token[:, None] * D + column[None, :], mask=chosen, other=0.0).to(tl.float32)
        if SIGNED:
            sign = tl.load(sign_rows_ptr + entry, mask=is_entry, other=0).to(tl.int64)
            signs = tl.load(signs_ptr + sign[:, None] * D + column[None, :], mask=chosen, other=0.0)
            numbers *= signs.to(tl.float32)
        total += tl.sum(numbers, axis=0)
        first += AT_ONCE
    return total


@triton.jit(do_not_specialize=["T"])
def _sum_blocks_kernel(
    tokens_ptr,
    signs_ptr,
    sign_rows_ptr,
    order_ptr,
    sorted_ptr,  # (m,)
    parts_ptr,  # (m // BLOCK, D) fp32; written for the blocks that belong to one row
    T,
    D,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    block = tl.program_id(0)
    first = block * BLOCK
    if tl.load(sorted_ptr + first) == tl.load(sorted_ptr + first + BLOCK - 1):
        total = _sum_entries(
            tokens_ptr, signs_ptr, sign_rows_ptr, order_ptr, first, first + BLOCK, T, D, SIGNED, AT_ONCE, WIDTH
        )
        column = tl.arange(0, WIDTH)
        tl.store(parts_ptr + block.to(tl.int64) * D + column, total, mask=column < D)


@triton.jit
def _sum_of_row(
    tokens_ptr,
    signs_ptr,
    sign_rows_ptr,
    order_ptr,
    starts_ptr,  # (n + 1,) int32
    parts_ptr,
    i,
    T,
    D,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sum of row i's entries, (WIDTH,) fp32: one by one, except those of whole blocks."""
    column = tl.arange(0, WIDTH)
    first = tl.load(starts_ptr + i)
    end = tl.load(starts_ptr + i + 1)
    block, last_block = (first + BLOCK - 1) // BLOCK, end // BLOCK
    has_blocks = block < last_block
    until = tl.where(has_blocks, block * BLOCK, first)
    rest = tl.where(has_blocks, last_block * BLOCK, first)
    total = _sum_entries(tokens_ptr, signs_ptr, sign_rows_ptr, order_ptr, first, until, T, D, SIGNED, AT_ONCE, WIDTH)
    while block < last_block:
        part = block + tl.arange(0, AT_ONCE)
        chosen = (part < last_block)[:, None] & (column < D)[None, :]
        parts = parts_ptr + part.to(tl.int64)[:, None] * D + column[None, :]
        total += tl.sum(tl.load(parts, mask=chosen, other=0.0), axis=0)
        block += AT_ONCE
    total += _sum_entries(tokens_ptr, signs_ptr, sign_rows_ptr, order_ptr, rest, end, T, D, SIGNED, AT_ONCE, WIDTH)
    return total


@triton.jit(do_not_specialize=["T"])
def _sum_rows_kernel(
    tokens_ptr,
    signs_ptr,
    sign_rows_ptr,
    order_ptr,
    starts_ptr,
    parts_ptr,
    out_ptr,  # (n, D)
    T,
    D,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i = tl.program_id(0)
    total = _sum_of_row(
        tokens_ptr, signs_ptr, sign_rows_ptr, order_ptr, starts_ptr, parts_ptr, i, T, D, SIGNED, BLOCK, AT_ONCE, WIDTH
    )
    column = tl.arange(0, WIDTH)
    tl.store(out_ptr + i.to(tl.int64) * D + column, total.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["number", "T"])
def _row_adam_kernel(
    values_ptr,  # (rows of the table, D)
    second_moment_ptr,  # (rows of the table,) fp32
    last_update_ptr,  # (rows of the table,) int32
    owed_ptr,  # (k,) fp32
    rows_ptr,  # (n,) int64
    tokens_ptr,
    signs_ptr,
    sign_rows_ptr,
    order_ptr,
    starts_ptr,
    parts_ptr,
    number,
    step_size,
    beta2,
    rest,  # 1 - beta2
    decay,
    eps,
    divisor,
    T,
    D,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < D
    # First load what does not depend on the sum.
    row = tl.load(rows_ptr + i)
    target = values_ptr + row * D + column
    weight = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    moment = tl.load(second_moment_ptr + row) * tl.load(owed_ptr + tl.load(last_update_ptr + row))
    gradient = _sum_of_row(
        tokens_ptr, signs_ptr, sign_rows_ptr, order_ptr, starts_ptr, parts_ptr, i, T, D, SIGNED, BLOCK, AT_ONCE, WIDTH
    )
    gradient = gradient / divisor
    moment = beta2 * moment + rest * (tl.sum(gradient * gradient) / D)
    change = gradient * (step_size / (tl.sqrt(moment) + eps))
    change = tl.where(change * weight > 0, change + weight * decay, change)
    tl.store(target, (weight - change).to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(second_moment_ptr + row, moment)
    tl.store(last_update_ptr + row, number)


def sum_of_rows_read(table: Tensor, rows: Tensor, signs: Signs | None, out: Tensor | None) -> Tensor:
    """`read_rows`."""
    (reads, tokens), width = rows.shape, table.shape[1]
    if out is None:
        out = table.new_empty(tokens, width)
    vectors, sign_rows = _flat(signs, table)
    sizes = {"READS": reads, "SIGNED": signs is not None, "WIDTH": triton.next_power_of_2(width)}
    options = {"num_warps": READ_WARPS, "num_stages": 1}
    _read_rows_kernel[(tokens,)](table, rows.contiguous(), vectors, sign_rows, out, tokens, width, **sizes, **options)
    return out


def sum_of_entries(entries: Entries, gradients: Gradients, dtype: torch.dtype) -> Tensor:
    """`sum_rows`: (n, D) in `dtype`."""
    tokens, width = gradients.tokens.shape
    out = gradients.tokens.new_empty(len(entries.starts) - 1, width, dtype=dtype)
    parts = _summed_blocks(entries, gradients)
    if len(out):
        _sum_rows_kernel[(len(out),)](
            *_flat_gradients(gradients), entries.order, entries.starts, parts, out, tokens, width, **_sizes(gradients)
        )
    return out


def update_rows(
    values: Tensor,
    second_moment: Tensor,
    last_update: Tensor,
    owed: Tensor,
    rows: Tensor,
    entries: Entries,
    gradients: Gradients,
    update: RowAdam,
) -> None:
    """`row_adam`."""
    tokens, width = gradients.tokens.shape
    parts = _summed_blocks(entries, gradients)
    numbers = update.step_size, update.beta2, 1 - update.beta2, update.decay, update.eps, update.divisor
    if len(rows):
        _row_adam_kernel[(len(rows),)](
            values,
            second_moment,
            last_update,
            owed,
            rows,
            *_flat_gradients(gradients),
            entries.order,
            entries.starts,
            parts,
            update.number,
            *map(float, numbers),
            tokens,
            width,
            **_sizes(gradients),
        )


def _summed_blocks(entries: Entries, gradients: Gradients) -> Tensor:
    """(blocks, D) fp32: sums of the blocks of sorted entries that belong to one row; other blocks' are undefined."""
    tokens, width = gradients.tokens.shape
    parts = gradients.tokens.new_empty(len(entries.order) // BLOCK, width, dtype=torch.float32)
    if len(parts):
        sizes = _sizes(gradients) | {"AT_ONCE": BLOCKS_AT_ONCE}
        _sum_blocks_kernel[(len(parts),)](
            *_flat_gradients(gradients), entries.order, entries.sorted, parts, tokens, width, **sizes
        )
    return parts


def _flat(signs: Signs | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if signs is None else (signs.vectors, signs.rows.contiguous())


def _flat_gradients(gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    return gradients.tokens, *_flat(gradients.signs, gradients.tokens)


def _sizes(gradients: Gradients) -> dict[str, int | bool]:
    return {
        "SIGNED": gradients.signs is not None,
        "BLOCK": BLOCK,
        "AT_ONCE": AT_ONCE,
        "WIDTH": triton.next_power_of_2(gradients.tokens.shape[1]),
        "num_warps": SUM_WARPS,
        "num_stages": 1,
    }
