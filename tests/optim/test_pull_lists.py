"""What ranks exchange in a cycle, against sets of rows; against what they ask one another: tests/distributed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pulls import lists_of

from nanogpt.optim.pull_lists import distinct

SLOTS, TOKENS = 8, 12


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [64, 4_000, 2**31 - 16])
def test_every_rank_knows_what_others_ask_of_it(rows: int, size: int, dtype: type) -> None:
    rng = np.random.default_rng(rows + size)
    steps: npt.NDArray[Any] = rng.integers(0, rows, (3, SLOTS, 2, TOKENS)).astype(dtype)
    steps[1, 1 % size] = rows - 1  # often the same, in the last part
    part = rows // size
    read = [{int(row) for row in steps[:, rank::size].flat} for rank in range(size)]
    for rank in range(size):
        lists = lists_of(*steps, rows=rows, rank=rank, size=size)
        assert lists.rows.tolist() == sorted(read[rank])
        assert lists.send_counts == [sum(row // part == owner for row in read[rank]) for owner in range(size)]
        asked = [sorted(row - rank * part for row in of_reader if row // part == rank) for of_reader in read]
        assert lists.asked.tolist() == [place for places in asked for place in places]
        assert lists.asked_counts == [len(places) for places in asked]
        assert lists.touched.tolist() == sorted({place for places in asked for place in places})
        assert {array.dtype for array in (lists.rows, lists.asked, lists.touched)} == {np.dtype(dtype)}


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_that_reads_nothing(size: int) -> None:
    nothing = np.zeros((2, 0), dtype=np.int32)
    rest = [np.array([5, 5, 3])] * (size - 1)
    lists = lists_of([nothing, *rest], rows=16, rank=0, size=size)
    assert lists.rows.tolist() == [] and lists.send_counts == [0] * size
    assert lists.asked.tolist() == lists.touched.tolist() == [3, 5] * (size - 1)
    assert lists.asked_counts == [0, 2][:size]
    assert distinct([]).tolist() == []
