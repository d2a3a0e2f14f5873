"""Triton kernels of the softcapped multi-token cross-entropy of e4m3 logits, whose gradient is wanted in two layouts.

With s the sigmoid inside the softcap, e = exp(cap (s - 1)) and S a row's sum of e, the gradient of a column is
`c e s (1 - s)` with a factor c = (sum of the row's weights) / S * constants. Three kernels:

1. by rows: S, the loss and c. No maximum is searched: cap, which no z reaches, serves all rows;
2. by tiles, which, unlike rows, can be stored in both layouts, a full sector of each at a time;
3. the columns of the targets again, minus the weights of the terms that share the column.

An e4m3 number has 256 values. So each program of the first two makes a table of e or of e s (1 - s), a value for each
thread, and looks every logit up in shared memory. This spares the exponentials and reciprocals that bound
`cross_entropy_triton`: two and a quarter for each column, 16 per clock and multiprocessor. A warp's look-up takes as
many clocks as it has different words in one bank: 2.5 for normal logits of standard deviation 3, by simulation.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanogpt.kernels.fp8_head_triton import _permute


class Config(NamedTuple):
    """Columns of a row at a time, and the warps that read them."""

    columns: int
    warps: int


class Tile(NamedTuple):
    """A tile of the gradient, in words of four rows and of four columns, and its warps."""

    rows: int
    columns: int
    warps: int


@triton.jit
def _pack_e5m2(a, b, c, d):
    """Words of four e5m2 numbers, a in the lowest byte: to the nearest, ties away from 0. Not for NaN.

    e5m2 is the upper byte of fp16, so half of that byte's last place is added to numbers cut off to fp16. The
    instruction for it, cvt.rn.satfinite.e5m2x2, is avoided: where its results are stored in two layouts, the assembler
    of CUDA 12.8, which Triton 3.6 brings, loses some of them; that of 13.0 does not.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 ab, cd;
        cvt.rz.f16x2.f32 ab, $2, $1;
        cvt.rz.f16x2.f32 cd, $4, $3;
        add.u32 ab, ab, 0x00800080;
        add.u32 cd, cd, 0x00800080;
        prmt.b32 $0, ab, cd, 0x7531;
        }
        """,
        "=r,f,f,f,f",
        [a, b, c, d],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _softcap(codes, CAP: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr):
    """Of e4m3 logits, given as their bytes: the sigmoid s, exp(CAP (s - 1)) and s (1 - s)."""
    u = (codes.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32) + SHIFT) / SCALE
    s = 1.0 / (1.0 + tl.exp(-u))
    return s, tl.exp(CAP * (s - 1.0)), s / (1.0 + tl.exp(u))


@triton.jit
def _codes(words):
    """The bytes of words, (..., 2, 2)."""
    low, high = tl.join(words & 255, (words >> 8) & 255), tl.join((words >> 16) & 255, (words >> 24) & 255)
    return tl.join(low, high)


@triton.jit
def _gradient_words(gradients, factor):
    """gradients: (..., 2, 2), as by `_codes`."""
    low, high = tl.split(gradients)
    a, b = tl.split(low)
    c, d = tl.split(high)
    return _pack_e5m2(a * factor, b * factor, c * factor, d * factor)


@triton.jit
def _term(
    row,
    targets_ptr,
    weights_ptr,
    prefixes_ptr,
    prefix_weight_ptr,
    T,
    TERM: tl.constexpr,
    K: tl.constexpr,
):
    """Of a loss term of the rows: its column, and its weight; -1 and 0 where a row has no such term."""
    if TERM < K:
        inside = row + TERM < T
        target = tl.load(targets_ptr + row + TERM, mask=inside, other=0)
        weight = tl.load(weights_ptr + TERM)
    else:
        target = tl.load(prefixes_ptr + row, mask=row < T, other=-1)
        inside = target >= 0
        weight = tl.load(prefix_weight_ptr)
    return tl.where(inside, target, -1), tl.where(inside, weight, 0.0)


@triton.jit
def _logits8_losses_kernel(
    logits_ptr,  # (T, V) uint8
    targets_ptr,  # (T,) int64
    weights_ptr,  # (K,) fp32
    prefixes_ptr,  # (T,) int64, -1 for none; read where TERMS > K
    prefix_weight_ptr,  # () fp32, likewise
    loss_ptr,  # (T,) fp32
    factor_ptr,  # (T,) fp32, or None
    T,
    V: tl.constexpr,
    K: tl.constexpr,
    TERMS: tl.constexpr,  # K, and one more where there are prefixes
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    GRAD_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,  # a power of two, at least V % BLOCK
):
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * V
    _, table, _ = _softcap(tl.arange(0, 256), CAP, SHIFT, SCALE)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(V // BLOCK):
        codes = tl.load(logits + i * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
        sums += tl.gather(table, codes, 0)
    total = tl.sum(sums)
    if TAIL > 0:
        column = V // BLOCK * BLOCK + tl.arange(0, TAIL)
        tail = tl.gather(table, tl.load(logits + column, mask=column < V, other=0).to(tl.int32), 0)
        total += tl.sum(tl.where(column < V, tail, 0.0))

    total_weight, pulls = 0.0, 0.0
    for term in tl.static_range(TERMS):
        target, weight = _term(row, targets_ptr, weights_ptr, prefixes_ptr, prefix_weight_ptr, T, term, K)
        s, _, _ = _softcap(tl.load(logits + target, mask=target >= 0, other=0), CAP, SHIFT, SCALE)
        total_weight += weight
        pulls += weight * s
    tl.store(loss_ptr + row, total_weight * (CAP + tl.log(total)) - CAP * pulls)
    if factor_ptr is not None:
        tl.store(factor_ptr + row, total_weight / total * (CAP / SCALE * GRAD_FACTOR))


@triton.jit
def _logits8_gradient_kernel(
    logits_ptr,  # (T, V / 4) int32, each four e4m3
    factor_ptr,  # (T,) fp32
    grad_ptr,  # (T, V / 4) int32, each four e5m2
    transposed_ptr,  # (V, T / 4) int32, each four e5m2
    ROW_WORDS,  # T / 4
    WORDS,  # V / 4
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile, in words of four rows
    COLUMNS: tl.constexpr,  # likewise
):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    first_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    row_inside, column_inside = first_row + row < ROW_WORDS, first_column + column < WORDS
    inside = row_inside[:, None] & column_inside[None, :]
    place = 4 * first_row.to(tl.int64) * WORDS + first_column + 4 * row[:, None] * WORDS + column[None, :]
    logits, grad, factors = logits_ptr + place, grad_ptr + place, factor_ptr + 4 * (first_row + row)
    w0 = tl.load(logits, mask=inside, other=0)
    w1 = tl.load(logits + WORDS, mask=inside, other=0)
    w2 = tl.load(logits + 2 * WORDS, mask=inside, other=0)
    w3 = tl.load(logits + 3 * WORDS, mask=inside, other=0)

    # One look-up for all of the tile: each one writes the table to shared memory and waits.
    codes = tl.join(tl.join(_codes(w0), _codes(w1)), tl.join(_codes(w2), _codes(w3)))
    _, e, slope = _softcap(tl.arange(0, 256), CAP, SHIFT, SCALE)
    looked_up = tl.gather(e * slope, tl.reshape(codes, [16 * ROWS * COLUMNS]), 0)
    low, high = tl.split(tl.reshape(looked_up, codes.shape))
    g0, g1 = tl.split(low)
    g2, g3 = tl.split(high)
    w0 = _gradient_words(g0, tl.load(factors, mask=row_inside, other=0.0)[:, None])
    w1 = _gradient_words(g1, tl.load(factors + 1, mask=row_inside, other=0.0)[:, None])
    w2 = _gradient_words(g2, tl.load(factors + 2, mask=row_inside, other=0.0)[:, None])
    w3 = _gradient_words(g3, tl.load(factors + 3, mask=row_inside, other=0.0)[:, None])
    tl.store(grad, w0, mask=inside)
    tl.store(grad + WORDS, w1, mask=inside)
    tl.store(grad + 2 * WORDS, w2, mask=inside)
    tl.store(grad + 3 * WORDS, w3, mask=inside)

    # Four words of four columns to four words of four rows, then the words of the tile trade places.
    a, b = _permute(w0, w1, "0x5140"), _permute(w0, w1, "0x7362")
    c, d = _permute(w2, w3, "0x5140"), _permute(w2, w3, "0x7362")
    transposed_inside = column_inside[:, None] & row_inside[None, :]
    transposed = transposed_ptr + 4 * first_column.to(tl.int64) * ROW_WORDS + first_row
    transposed += 4 * column[:, None] * ROW_WORDS + row[None, :]
    tl.store(transposed, _permute(a, c, "0x5410").T, mask=transposed_inside)
    tl.store(transposed + ROW_WORDS, _permute(a, c, "0x7632").T, mask=transposed_inside)
    tl.store(transposed + 2 * ROW_WORDS, _permute(b, d, "0x5410").T, mask=transposed_inside)
    tl.store(transposed + 3 * ROW_WORDS, _permute(b, d, "0x7632").T, mask=transposed_inside)


@triton.jit
def _logits8_targets_kernel(
    logits_ptr,  # (T, V) uint8
    targets_ptr,  # as above, like the next three
    weights_ptr,
    prefixes_ptr,
    prefix_weight_ptr,
    factor_ptr,  # (T,) fp32
    grad_ptr,  # (T, V) uint8
    transposed_ptr,  # (V, T) uint8
    T,
    V: tl.constexpr,
    K: tl.constexpr,
    TERMS: tl.constexpr,
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    GRAD_FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64) * V
    factor = tl.load(factor_ptr + row, mask=row < T, other=0.0)
    for term in tl.static_range(TERMS):
        target, _ = _term(row, targets_ptr, weights_ptr, prefixes_ptr, prefix_weight_ptr, T, term, K)
        pull = tl.zeros([ROWS], tl.float32)
        for other in tl.static_range(TERMS):
            also, weight = _term(row, targets_ptr, weights_ptr, prefixes_ptr, prefix_weight_ptr, T, other, K)
            pull += tl.where(also == target, weight, 0.0)
        inside = target >= 0
        _, e, slope = _softcap(tl.load(logits_ptr + start + target, mask=inside, other=0), CAP, SHIFT, SCALE)
        g = (e * factor - pull * (CAP / SCALE * GRAD_FACTOR)) * slope
        # NaN among a row's logits makes its factor NaN.
        byte = tl.where(tl.abs(g) >= 0, _pack_e5m2(g, g, g, g), 0x7F).to(tl.uint8)
        tl.store(grad_ptr + start + target, byte, mask=inside)
        tl.store(transposed_ptr + target * T + row, byte, mask=inside)


def losses_and_gradients(
    logits: Tensor,  # (T, V) e4m3, contiguous, T and V multiples of 16
    targets: Tensor,  # (T,) int64
    weights: Tensor,  # (K,) fp32
    *,
    prefixes: Tensor | None,  # (T,) int64
    prefix_weight: Tensor | None,  # () fp32
    cap: float,
    shift: float,
    scale: float,
    grad_factor: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`e4m3_cross_entropy`: losses, and with `need_grad` the gradient in both layouts."""
    tokens, vocab = logits.shape
    terms = (
        targets.contiguous(),
        weights.contiguous(),
        targets if prefixes is None else prefixes.contiguous(),
        weights if prefix_weight is None else prefix_weight.float(),
    )
    constants: dict[str, Any] = {"CAP": cap, "SHIFT": shift, "SCALE": scale}
    of_terms: dict[str, Any] = {"V": vocab, "K": len(weights), "TERMS": len(weights) + (prefixes is not None)}
    of_terms["GRAD_FACTOR"] = grad_factor
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    factor = torch.empty_like(losses) if need_grad else None
    rest = vocab % LOSSES.columns
    _logits8_losses_kernel[(tokens,)](
        logits.view(torch.uint8),
        *terms,
        losses,
        factor,
        tokens,
        **constants,
        **of_terms,
        BLOCK=LOSSES.columns,
        TAIL=triton.next_power_of_2(rest) if rest else 0,
        num_warps=LOSSES.warps,
    )
    if factor is None:
        return losses, None, None
    grad = torch.empty_like(logits, dtype=torch.float8_e5m2)
    transposed = grad.new_empty(vocab, tokens)
    grid = (triton.cdiv(tokens // 4, GRADIENT.rows), triton.cdiv(vocab // 4, GRADIENT.columns))
    _logits8_gradient_kernel[grid](
        logits.view(torch.int32),
        factor,
        grad.view(torch.int32),
        transposed.view(torch.int32),
        tokens // 4,
        vocab // 4,
        **constants,
        ROWS=GRADIENT.rows,
        COLUMNS=GRADIENT.columns,
        num_warps=GRADIENT.warps,
    )
    _logits8_targets_kernel[(triton.cdiv(tokens, TARGET_ROWS),)](
        logits.view(torch.uint8),
        *terms,
        factor,
        grad.view(torch.uint8),
        transposed.view(torch.uint8),
        tokens,
        **constants,
        **of_terms,
        ROWS=TARGET_ROWS,
        num_warps=4,
    )
    return losses, grad, transposed


LOSSES = Config(columns=4096, warps=8)
GRADIENT = Tile(rows=32, columns=32, warps=8)
TARGET_ROWS = 128
