"""Triton kernel of the softcapped multi-token cross-entropy: from a row of logits to its loss and gradient in one read.

One program takes a row. With s the sigmoid inside the softcap and S the sum of exp(cap s), the gradient of a column is
`c exp(cap s) s (1 - s)` with a factor c that is known only after S. So the first pass keeps the product without c in
registers, as pairs of bf16 (two rows fit a multiprocessor, one loading while the other computes), and the second
multiplies, rounds and stores: no exponential is taken twice. Keeping bf16 does not show in an e5m2 gradient.

The first pass is bound by the special-function unit: 16 results per clock and multiprocessor. Two exponentials of
each column are needed; the reciprocals of four columns are taken as one (1/a = bcd / abcd). Logits are read as 32-bit
words of two columns.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))


class Config(NamedTuple):
    """How a row is processed: words (pairs of columns) at a time, warps, registers per thread."""

    words: int
    warps: int
    registers: int | None


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _pack_bf16(low, high):
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _pack_e5m2(low, high):
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e5m2x2.f32 $0, $2, $1;", "=h,f,f", [low, high], dtype=tl.int16, is_pure=True, pack=1
    )


@triton.jit
def _low(words):
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(words):
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _one_plus_exp(logit, SHIFT: tl.constexpr, SCALE: tl.constexpr):
    """1 + exp(-u) for u = (logit + SHIFT) / SCALE, capped at 2^30 + 1 so that a product of four stays finite."""
    power = logit * (-LOG2_E / SCALE) - SHIFT * LOG2_E / SCALE
    return 1.0 + _exp2(tl.minimum(power, 30.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _sigmoids(words, SHIFT: tl.constexpr, SCALE: tl.constexpr):
    """The sigmoids of the two logits of each word."""
    a = _one_plus_exp(_low(words), SHIFT, SCALE)
    b = _one_plus_exp(_high(words), SHIFT, SCALE)
    inverse = _reciprocal(a * b)
    return inverse * b, inverse * a


@triton.jit
def _sigmoids_of_four(words, more_words, SHIFT: tl.constexpr, SCALE: tl.constexpr):
    """The sigmoids of two words' logits by one reciprocal."""
    a = _one_plus_exp(_low(words), SHIFT, SCALE)
    b = _one_plus_exp(_high(words), SHIFT, SCALE)
    c = _one_plus_exp(_low(more_words), SHIFT, SCALE)
    d = _one_plus_exp(_high(more_words), SHIFT, SCALE)
    ab, cd = a * b, c * d
    inverse = _reciprocal(ab * cd)
    inverse_ab, inverse_cd = inverse * cd, inverse * ab
    return inverse_ab * b, inverse_ab * a, inverse_cd * d, inverse_cd * c


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (T, V / 2) int32, each two bf16
    targets_ptr,  # (T,) int64
    weights_ptr,  # (K,) fp32
    prefixes_ptr,  # (T,) int64, -1 for none; read where PREFIXES
    prefix_weight_ptr,  # () fp32, read where PREFIXES
    loss_ptr,  # (T,) fp32
    grad_ptr,  # (T, V / 2) int32 (two bf16) or int16 (two e5m2); not touched without WRITE_GRAD
    T,
    WORDS: tl.constexpr,  # V / 2
    K: tl.constexpr,
    PREFIXES: tl.constexpr,  # one more target a row
    K_PADDED: tl.constexpr,  # a power of two, at least K + PREFIXES
    CAP: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    E5M2: tl.constexpr,
    GRAD_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,  # a power of two, at least WORDS % (2 BLOCK)
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * WORDS
    grad = grad_ptr + row * WORDS
    PAIRS: tl.constexpr = WORDS // (2 * BLOCK)
    columns = tl.arange(0, BLOCK)

    # The targets of this row: K of them, fewer at the end of the micro-batch.
    k = tl.arange(0, K_PADDED)
    inside = (k < K) & (row + k < T)
    target = tl.load(targets_ptr + row + k, mask=inside, other=0)
    weight = tl.load(weights_ptr + k, mask=inside, other=0.0)
    if PREFIXES:
        prefix = tl.load(prefixes_ptr + row)
        is_prefix = (k == K) & (prefix >= 0)
        target = tl.where(is_prefix, prefix, target)
        weight = tl.where(is_prefix, tl.load(prefix_weight_ptr), weight)
        inside = inside | is_prefix

    sums = tl.zeros([BLOCK], tl.float32)
    kept = ()
    for i in tl.static_range(PAIRS):
        place = logits + 2 * i * BLOCK + columns
        a, b, c, d = _sigmoids_of_four(tl.load(place), tl.load(place + BLOCK), SHIFT, SCALE)
        e_a, e_b = _exp2(a * (CAP * LOG2_E)), _exp2(b * (CAP * LOG2_E))
        e_c, e_d = _exp2(c * (CAP * LOG2_E)), _exp2(d * (CAP * LOG2_E))
        sums += (e_a + e_b) + (e_c + e_d)
        if WRITE_GRAD:
            kept += (  # type: ignore[assignment]
                _pack_bf16(e_a * (a - a * a), e_b * (b - b * b)),
                _pack_bf16(e_c * (c - c * c), e_d * (d - d * d)),
            )
    total = tl.sum(sums)
    word = tl.load(logits + target // 2, mask=inside, other=0)
    if TAIL > 0:
        column = 2 * PAIRS * BLOCK + tl.arange(0, TAIL)
        a, b = _sigmoids(tl.load(logits + column, mask=column < WORDS, other=0), SHIFT, SCALE)
        e_a, e_b = _exp2(a * (CAP * LOG2_E)), _exp2(b * (CAP * LOG2_E))
        total += tl.sum(tl.where(column < WORDS, e_a + e_b, 0.0))
        if WRITE_GRAD:
            tail = _pack_bf16(e_a * (a - a * a), e_b * (b - b * b))

    total_weight = tl.sum(weight)
    if WRITE_GRAD:
        factor = total_weight / total * (CAP / SCALE * GRAD_FACTOR)
        for i in tl.static_range(2 * PAIRS):
            a, b = _low(kept[i]) * factor, _high(kept[i]) * factor
            tl.store(grad + i * BLOCK + columns, _pack_e5m2(a, b) if E5M2 else _pack_bf16(a, b))
        if TAIL > 0:
            a, b = _low(tail) * factor, _high(tail) * factor
            tl.store(grad + column, _pack_e5m2(a, b) if E5M2 else _pack_bf16(a, b), mask=column < WORDS)

    s = _reciprocal(_one_plus_exp(tl.where(target % 2 == 0, _low(word), _high(word)), SHIFT, SCALE))
    tl.store(loss_ptr + row, total_weight * tl.log(total) - CAP * tl.sum(weight * s))

    if WRITE_GRAD:
        # The target columns again, once all threads have written: minus the weights of all terms that share the column.
        tl.debug_barrier()
        pull = tl.sum(tl.where(target[:, None] == target[None, :], weight[None, :], 0.0), axis=1)
        g = (total_weight * _exp2(s * (CAP * LOG2_E)) / total - pull) * (s - s * s) * (CAP / SCALE * GRAD_FACTOR)
        if E5M2:
            byte = _pack_e5m2(g, g).to(tl.int8)
            tl.store(grad_ptr.to(tl.pointer_type(tl.int8)) + 2 * row * WORDS + target, byte, mask=inside)
        else:
            bf16 = _pack_bf16(g, g).to(tl.int16)
            tl.store(grad_ptr.to(tl.pointer_type(tl.int16)) + 2 * row * WORDS + target, bf16, mask=inside)


def loss_and_gradient(
    logits: Tensor,  # (T, V) bf16, contiguous, V a multiple of 8
    targets: Tensor,  # (T,) int64
    weights: Tensor,  # (K,) fp32
    grad: Tensor | None,  # (T, V) bf16 (may be `logits` itself) or e5m2, contiguous; None: the loss alone
    *,
    prefixes: Tensor | None = None,  # (T,) int64
    prefix_weight: Tensor | None = None,  # () fp32
    cap: float,
    shift: float,
    scale: float,
    grad_factor: float = 1.0,
    config: Config | None = None,
) -> Tensor:
    """Weighted losses (T,) in fp32; `grad`, where given, receives `grad_factor` times the gradient of their sum."""
    tokens, vocab = logits.shape
    words = vocab // 2
    e5m2 = grad is not None and grad.dtype == torch.float8_e5m2
    if config is None:
        config = FORWARD if grad is None else BACKWARD
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    logit_words = logits.view(torch.int32)
    grad_words = logit_words if grad is None else grad.view(torch.int16 if e5m2 else torch.int32)
    rest = words % (2 * config.words)
    _cross_entropy_kernel[(tokens,)](
        logit_words,
        targets.contiguous(),
        weights.contiguous(),
        targets if prefixes is None else prefixes.contiguous(),
        weights if prefix_weight is None else prefix_weight.float(),
        losses,
        grad_words,
        tokens,
        WORDS=words,
        K=weights.shape[0],
        PREFIXES=prefixes is not None,
        K_PADDED=triton.next_power_of_2(weights.shape[0] + (prefixes is not None)),
        CAP=cap,
        SHIFT=shift,
        SCALE=scale,
        WRITE_GRAD=grad is not None,
        E5M2=e5m2,
        GRAD_FACTOR=grad_factor,
        BLOCK=config.words,
        TAIL=triton.next_power_of_2(rest) if rest else 0,
        num_warps=config.warps,
        maxnreg=config.registers,
    )
    return losses


# Measured on an H200. BACKWARD keeps V / 512 registers a thread for the gradient: right for the GPT-2 vocabulary, and
# registers spill above 60,000 columns.
FORWARD = Config(words=1024, warps=8, registers=64)
BACKWARD = Config(words=2048, warps=8, registers=128)
