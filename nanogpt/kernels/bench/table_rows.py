"""Timing what record 92 does with its table: rows read by a micro-batch, and the sums and update of a cycle's rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt.kernels.bench import BenchCase
from nanogpt.kernels.table_rows import Gradients, RowAdam, Signs, entries_of, read_rows, row_adam, sum_rows

ROWS, SIGNS, WIDTH = 21_150_720, 8_192, 768  # a quarter of the record's rows
TOKENS = 49_152  # of a micro-batch
MICRO_BATCHES = 32  # of a cycle: 8 slots of 4 steps


def bench_cases(device: torch.device | str = "cuda") -> Iterator[BenchCase]:
    """A micro-batch of the record's longest stage, and a cycle on one GPU; rows as frequent as in text.

    The update includes the sort of what was read; the sums, which several GPUs send each other, do not.
    """
    tokens, rows = TOKENS, ROWS
    while 2 * WIDTH * rows > torch.cuda.mem_get_info(device)[0] // 4:  # as many as there is room for: reads scatter
        rows //= 2
    table = torch.empty(rows, WIDTH, dtype=torch.bfloat16, device=device).normal_(std=0.1)
    vectors = (2 * torch.randint(2, (SIGNS, WIDTH), device=device) - 1).bfloat16()

    read, signs = _read(tokens, rows, device), Signs(vectors, _sign_rows(tokens, device))

    def error_of_read(read: Tensor = read, signs: Signs = signs) -> float:
        exact = (table[read].double() * vectors[signs.rows]).sum(0)
        return _error(read_rows(table, read, signs), exact)

    yield BenchCase(
        "rows of a large table read",
        f"2 x {tokens:,} x {WIDTH} of {rows:,}",
        functools.partial(read_rows, table, read, signs),
        functools.partial(read_rows, table, read, signs, plain=True),
        flops=0,
        bytes=2 * WIDTH * (torch.unique(read).numel() + SIGNS + tokens) + 16 * tokens,
        error=error_of_read,
    )

    tokens *= MICRO_BATCHES
    read, signs = _read(tokens, rows, device), Signs(vectors, _sign_rows(tokens, device))
    touched = torch.unique(read).long()
    gradients = Gradients(torch.randn(tokens, WIDTH, dtype=torch.bfloat16, device=device), signs)
    moments, last_update = torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.int32, device=device)
    update = RowAdam(number=1, step_size=0.01, beta2=0.95, decay=1e-3, eps=1e-10, divisor=1.0)
    owed = torch.ones(2, device=device)
    grouped = entries_of(touched, read.flatten())
    sums = functools.partial(sum_rows, grouped, gradients, torch.bfloat16)

    every = max(1, len(touched) // 20_000)
    sample = touched[::every]

    def exact_sums() -> Tensor:
        place = torch.searchsorted(sample, read.flatten().long()).clamp(max=len(sample) - 1)
        entry = (sample[place] == read.flatten()).nonzero().flatten()
        numbers = gradients.tokens[entry % tokens].double() * vectors[signs.rows.flatten()[entry]]
        return torch.zeros(len(sample), WIDTH, dtype=numbers.dtype, device=device).index_add_(0, place[entry], numbers)

    def error_of_sums() -> float:
        return _error(sums()[::every], exact_sums())

    def run(*, plain: bool) -> None:
        entries = entries_of(touched, read.flatten())
        row_adam(table, moments, last_update, owed, touched, entries, gradients, update, plain=plain)

    def error_of_update() -> float:
        weights, before = table[sample].double(), moments[sample].double()
        run(plain=False)
        g = exact_sums()
        moment = update.beta2 * before + (1 - update.beta2) * g.square().mean(1)
        change = g * (update.step_size / (moment.sqrt() + update.eps))[:, None]
        change = torch.where(change * weights > 0, change + weights * update.decay, change)
        errors = _error(table[sample], weights - change), _error(moments[sample], moment)
        return torch.tensor(errors).max().item()  # NaN if either is, which `max` may pass over

    yield BenchCase(
        "rows of a large table summed",
        f"2 x {tokens:,} x {WIDTH} into {len(touched):,}",
        sums,
        functools.partial(sums, plain=True),
        flops=0,
        bytes=2 * WIDTH * (tokens + SIGNS + len(touched)) + 24 * tokens + 4 * len(touched),
        error=error_of_sums,
    )
    yield BenchCase(
        "rows of a large table updated",
        f"2 x {tokens:,} x {WIDTH} into {len(touched):,} of {rows:,}",
        functools.partial(run, plain=False),
        functools.partial(run, plain=True),
        flops=0,
        bytes=2 * WIDTH * (tokens + SIGNS + 2 * len(touched)) + 16 * tokens + 24 * len(touched),
        error=error_of_update,
    )


def _read(tokens: int, rows: int, device: torch.device | str) -> Tensor:
    """(2, T) int32: rows of each half, scattered over it; in the first half frequent ones are more common."""
    half = rows // 2
    halves = []
    for number, skew in enumerate((1.0, 0.4)):
        rank = (half ** (torch.rand(tokens, device=device) ** skew)).long().clamp(max=half - 1)
        halves.append(number * half + rank * 2_654_435_761 % half)
    return torch.stack(halves).int()


def _sign_rows(tokens: int, device: torch.device | str) -> Tensor:
    return torch.randint(SIGNS, (2, tokens), dtype=torch.int32, device=device)


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()
