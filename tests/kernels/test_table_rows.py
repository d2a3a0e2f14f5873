"""Rows of a large table, read, summed and updated: in plain PyTorch, and the kernels by Triton's interpreter."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from small_specs import relative_error
from torch import Tensor
from triton_interpreter import needs_triton, run_interpreted

from nanogpt.kernels.table_rows import Gradients, RowAdam, Signs, entries_of, read_rows, row_adam, sum_rows

UPDATE = RowAdam(number=3, step_size=0.3, beta2=0.9025, decay=0.02, eps=1e-10, divisor=2.0)


class Case(NamedTuple):
    """A table in the middle of training, and what tokens have read of it."""

    table: Tensor  # (n, D)
    moment: Tensor  # (n,)
    last_update: Tensor  # (n,) int32
    owed: Tensor  # (3,)
    rows: Tensor  # those that are updated: all that was read, and the table's last one
    read: Tensor  # (2, T)
    signs: Signs
    gradient: Tensor  # (T, D)

    def entries(self):
        return entries_of(self.rows, self.read.flatten())

    def gradients(self, *, signed: bool) -> Gradients:
        return Gradients(self.gradient, self.signs if signed else None)


def make_case(read: Tensor, width: int, *, rows: int = 90, dtype: torch.dtype = torch.float32) -> Case:
    """read: (2, T)."""
    torch.manual_seed(read.shape[1])
    vectors = (2 * torch.randint(2, (8, width)) - 1).to(dtype)
    return Case(
        torch.randn(rows, width).to(dtype),
        torch.rand(rows),
        torch.randint(3, (rows,), dtype=torch.int32),
        torch.tensor([0.8, 0.9, 1.0]),
        torch.unique(torch.cat((read.flatten(), torch.tensor([rows - 1])))),
        read.int(),
        Signs(vectors, torch.randint(8, read.shape, dtype=torch.int32)),
        torch.randn(read.shape[1], width).to(dtype),
    )


def expected_sums(case: Case, *, signed: bool) -> Tensor:
    """(n, D) fp64, token by token."""
    total = torch.zeros(case.table.shape, dtype=torch.float64)
    for rows, sign_rows in zip(case.read.tolist(), case.signs.rows.tolist(), strict=True):
        for token, (row, sign) in enumerate(zip(rows, sign_rows, strict=True)):
            factor = case.signs.vectors[sign].double() if signed else 1.0
            total[row] += case.gradient[token].double() * factor
    return total


def expected_update(case: Case, total: Tensor) -> tuple[Tensor, Tensor]:
    """The table and the moments in fp64, from the rows' summed gradients."""
    table, moments = case.table.double(), case.moment.double()
    for row in case.rows.tolist():
        g = total[row] / UPDATE.divisor
        moment = float(moments[row]) * float(case.owed[case.last_update[row]])
        moment = UPDATE.beta2 * moment + (1 - UPDATE.beta2) * float(g.square().mean())
        change = g * UPDATE.step_size / (math.sqrt(moment) + UPDATE.eps)
        towards_zero = change * table[row] > 0
        table[row] -= change + towards_zero * UPDATE.decay * table[row]
        moments[row] = moment
    return table, moments


def check(case: Case, tolerance: float) -> None:
    """All operations on `case` against fp64, where they add signs and where not."""
    for signed in (True, False):
        read = read_rows(case.table, case.read, case.signs if signed else None)
        parts = case.table.double()[case.read.long()]
        if signed:
            parts = parts * case.signs.vectors.double()[case.signs.rows.long()]
        assert relative_error(read, parts.sum(0)) < tolerance

        total = expected_sums(case, signed=signed)
        entries, gradients = case.entries(), case.gradients(signed=signed)
        assert relative_error(sum_rows(entries, gradients, torch.float32), total[case.rows]) < 1e-6

        values, moment, last_update = case.table.clone(), case.moment.clone(), case.last_update.clone()
        row_adam(values, moment, last_update, case.owed, case.rows, entries, gradients, UPDATE)
        table, moments = expected_update(case, total)
        assert relative_error(values, table) < tolerance
        assert relative_error(moment, moments) < 1e-6
        untouched = torch.ones(len(values), dtype=torch.bool).index_fill_(0, case.rows, False)
        assert torch.equal(values[untouched], case.table[untouched]) and untouched.any()
        assert torch.equal(last_update[untouched], case.last_update[untouched])
        assert (last_update[case.rows] == UPDATE.number).all()


def runs_of(*lengths: int) -> Tensor:
    """(2, T): rows 0, 1, ... so often each, and the same as tokens in any order of the rows behind them."""
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return torch.stack((rows, len(lengths) + rows[torch.randperm(len(rows))]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("width", [6, 16])
def test_rows_in_plain_pytorch_against_fp64(dtype, tolerance, width):
    check(make_case(torch.randint(80, (2, 70)), width, dtype=dtype), tolerance)


def test_entries_of_a_row_stay_in_their_order():
    entries = entries_of(torch.tensor([1, 2, 4, 6]), torch.tensor([4, 1, 4, 6, 1], dtype=torch.int32))
    assert entries.sorted.tolist() == [1, 1, 4, 4, 6]
    assert entries.order.tolist() == [1, 4, 0, 2, 3]
    assert entries.starts.tolist() == [0, 2, 2, 4, 5]


def test_rows_are_read_into_what_is_given():
    case = make_case(torch.randint(80, (2, 9)), 6)
    out = torch.empty(9, 6)
    assert read_rows(case.table, case.read, case.signs, out=out) is out
    assert torch.equal(out, read_rows(case.table, case.read, case.signs))


def interpreted() -> None:
    """In a process of its own: the kernels on a CPU, on rows with entries within a block and over several."""
    from unittest import mock

    from nanogpt.kernels import table_rows, table_rows_triton

    block, at_once = 8, table_rows_triton.AT_ONCE
    lengths = block, block - 1, 1, 3 * block, 5, 2 * block - 5, 1, block + 1
    cases = {
        "rows within a block, at its end, and over several": (runs_of(*lengths), 24),
        "the same, as wide as a power of two": (runs_of(*lengths), 16),
        "one token": (torch.tensor([[4], [7]]), 24),
        "one row of many blocks": (runs_of((2 * at_once + 1) * block + 3), 24),
        "as many as are summed at once, more and less": (runs_of(*range(1, at_once + 4)), 24),
        "each row once": (torch.randperm(40).view(2, 20), 24),
    }
    with (
        mock.patch.object(table_rows, "runs_kernel", lambda *tensors: True),
        mock.patch.object(table_rows_triton, "BLOCK", block),
    ):
        for name, (read, width) in cases.items():
            try:
                check(make_case(read, width), 1e-6)
            except AssertionError as error:
                raise AssertionError(name) from error


@needs_triton
def test_the_kernels_in_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
