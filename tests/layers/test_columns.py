"""Chosen columns of a matrix."""

from __future__ import annotations

import pytest
import torch

from nanogpt.layers.columns import chosen_columns


@pytest.mark.parametrize("columns", [[0, 3, 4, 8], [2], list(range(9)), [7, 1, 5]])
def test_columns_and_gradient_are_those_of_indexing(columns: list[int]):
    generator = torch.Generator().manual_seed(0)
    matrix, gradient = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (9, len(columns)))
    chosen, place = torch.tensor(columns), torch.full((9,), -1)
    place[chosen] = torch.arange(len(columns))
    gradients = []
    for read in (lambda m: chosen_columns(m, chosen, place), lambda m: m[:, chosen]):
        leaf = matrix.clone().requires_grad_()
        out = read(leaf)
        assert torch.equal(out, matrix[:, chosen])
        out.backward(gradient)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_column_that_is_not_chosen_gets_no_part_of_an_infinite_gradient():
    matrix = torch.ones(2, 3, requires_grad=True)
    chosen_columns(matrix, torch.tensor([1]), torch.tensor([-1, 0, -1])).backward(torch.full((2, 1), torch.inf))
    assert matrix.grad is not None and matrix.grad.tolist() == [[0, torch.inf, 0]] * 2
