"""Gradients added to a table row by row: in plain PyTorch, and the kernels by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from small_specs import relative_error
from triton_interpreter import needs_triton, run_interpreted

from nanogpt.kernels.row_gradients import add_rows, row_order


def random_rows(tokens: int, rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    read = torch.randint(rows, (tokens,), dtype=torch.int32)
    return torch.randn(rows, width).to(dtype), read, torch.randn(tokens, width).to(dtype)


def test_rows_are_sorted_with_equal_ones_in_the_order_of_their_tokens():
    order = row_order(torch.tensor([3, 1, 3, 0, 1]))
    assert order.sorted.tolist() == [0, 1, 1, 3, 3]
    assert order.tokens.tolist() == [3, 1, 4, 0, 2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 0)])
@pytest.mark.parametrize("tokens", [1, 70, 500])
def test_each_row_gets_the_sum_of_its_tokens(dtype, tolerance, tokens):
    table, read, grads = random_rows(tokens, 37, 16, dtype)
    expected = table.double().index_add(0, read.long(), grads.double())
    add_rows(table, row_order(read), grads)
    # In bf16 the sum is rounded once: nothing is left of the difference but what fp32 may do to a tie.
    assert relative_error(table, expected.to(dtype)) <= max(tolerance, 1e-3 if dtype == torch.bfloat16 else 0)


def test_a_part_of_a_table_is_changed_in_place():
    table = torch.zeros(6, 4)
    add_rows(table[2:4], row_order(torch.tensor([1, 1])), torch.ones(2, 4))
    assert table.sum(1).tolist() == [0, 0, 0, 8, 0, 0]


def interpreted() -> None:
    """In a process of its own: the kernels on a CPU, on rows that end within a block, at its end, and blocks later."""
    from nanogpt.kernels.row_gradients_triton import AT_ONCE, BLOCK, add_sorted_rows

    runs = [BLOCK, BLOCK - 1, 1, 3 * BLOCK, 5, 2 * BLOCK - 5, 1, BLOCK + 1]
    by_length = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs))
    cases = {
        "rows of these lengths": by_length,
        "the same, tokens in any order": by_length[torch.randperm(len(by_length))],
        "one token": torch.tensor([4]),
        "one row": torch.zeros(3 * BLOCK + 7, dtype=torch.int64),
        "one row of many blocks": torch.arange(2).repeat_interleave((2 * AT_ONCE + 1) * BLOCK),
        "one row of as many as are added at once": torch.arange(3).repeat_interleave((AT_ONCE + 1) * BLOCK),
        "each row once": torch.randperm(2 * BLOCK + 3),
    }
    for name, read in cases.items():
        for width in (16, 144):
            table, grads = torch.randn(80, width), torch.randn(len(read), width)
            expected = table.double().index_add(0, read, grads.double())
            order = row_order(read.int())
            add_sorted_rows(table, order.sorted, order.tokens, grads)
            error = relative_error(table, expected)
            assert error < 1e-6, f"{name}, width {width}: {error}"


@needs_triton
def test_the_kernels_in_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
