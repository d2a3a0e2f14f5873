"""Triton kernels that add sorted rows to a table; see `nanogpt.kernels.row_gradients`.

A program takes a block of the sorted rows. One product with a matrix of zeros and ones, which marks what belongs to the
same row, gives every row's sum at once. Rows that lie within a block are added to the table by its program. The parts
of a row that spans several blocks are put aside, and added by the second kernel: by the program of the block in
which the row begins, in the order of the blocks. So each row of the table has one writer.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # sorted rows per program
COLUMNS = 128
WARPS = 4
AT_ONCE = 16  # how many blocks' parts of one row are added at a time
NO_ROW = tl.constexpr(-1)


@triton.jit
def _add_within_blocks_kernel(
    table_ptr,  # (n, D)
    rows_ptr,  # (T,) sorted
    tokens_ptr,  # (T,) int64
    grads_ptr,  # (T, D)
    parts_ptr,  # (blocks, 2, D) fp32: of the row that began before the block, of the one that continues after it
    T,
    D,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK
    place = start + tl.arange(0, BLOCK)
    inside = place < T
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = (column < D)[None, :]
    row = tl.load(rows_ptr + place, mask=inside, other=NO_ROW)
    token = tl.load(tokens_ptr + place, mask=inside, other=0)
    grads = tl.load(grads_ptr + token[:, None] * D + column[None, :], mask=inside[:, None] & in_row, other=0.0)
    same = (row[:, None] == row[None, :]).to(grads.dtype)
    sums = tl.dot(same, grads, input_precision="ieee")  # every place holds its row's sum

    previous = tl.load(rows_ptr + place - 1, mask=inside & (place > 0), other=NO_ROW)
    first = inside & ((row != previous) | (place == start))  # of its row in this block
    before = tl.load(rows_ptr + start - 1, mask=start > 0, other=NO_ROW)
    after = tl.load(rows_ptr + start + BLOCK, mask=start + BLOCK < T, other=NO_ROW)
    whole = (row != before) & (row != after)

    target = table_ptr + row.to(tl.int64)[:, None] * D + column[None, :]
    chosen = (first & whole)[:, None] & in_row
    total = tl.load(target, mask=chosen, other=0.0).to(tl.float32) + sums
    tl.store(target, total.to(table_ptr.dtype.element_ty), mask=chosen)

    part = 2 * tl.program_id(0) + (row != before).to(tl.int32)
    chosen = (first & ~whole)[:, None] & in_row
    tl.store(parts_ptr + part[:, None] * D + column[None, :], sums, mask=chosen)


@triton.jit
def _add_across_blocks_kernel(
    table_ptr,
    rows_ptr,
    parts_ptr,
    T,
    D,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,  # blocks
):
    block = tl.program_id(0)
    start = block * BLOCK
    end = start + BLOCK
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < D
    before = tl.load(rows_ptr + start - 1, mask=start > 0, other=NO_ROW)
    row = tl.load(rows_ptr + end - 1, mask=end < T, other=NO_ROW)  # of the block's last place
    after = tl.load(rows_ptr + end, mask=end < T, other=NO_ROW)
    if (row == after) & (row != before) & (end < T):  # begins here, and continues
        total = tl.load(parts_ptr + (2 * block + 1) * D + column, mask=in_row, other=0.0)
        following = block + 1 + tl.arange(0, AT_ONCE)
        going = True
        while going:
            first = tl.load(rows_ptr + following * BLOCK, mask=following * BLOCK < T, other=NO_ROW)
            belongs = first == row
            part = parts_ptr + 2 * following[:, None] * D + column[None, :]
            total += tl.sum(tl.load(part, mask=belongs[:, None] & in_row[None, :], other=0.0), axis=0)
            going = tl.sum(belongs.to(tl.int32)) == AT_ONCE
            following += AT_ONCE
        target = table_ptr + row.to(tl.int64) * D + column
        total += tl.load(target, mask=in_row, other=0.0).to(tl.float32)
        tl.store(target, total.to(table_ptr.dtype.element_ty), mask=in_row)


def add_sorted_rows(table: Tensor, rows: Tensor, tokens: Tensor, grads: Tensor) -> None:
    """`table[rows[i]] += grads[tokens[i]]` for each i. table (n, D), rows sorted (T,), tokens (T,), grads (T, D)."""
    count, width = grads.shape
    blocks = triton.cdiv(count, BLOCK)
    grid = (blocks, triton.cdiv(width, COLUMNS))
    parts = torch.empty((blocks, 2, width), dtype=torch.float32, device=table.device)
    sizes = {"BLOCK": BLOCK, "COLUMNS": COLUMNS, "num_warps": WARPS}
    _add_within_blocks_kernel[grid](table, rows, tokens, grads, parts, count, width, **sizes)
    _add_across_blocks_kernel[grid](table, rows, parts, count, width, AT_ONCE=AT_ONCE, **sizes)
