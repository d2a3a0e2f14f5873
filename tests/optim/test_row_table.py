"""The rows that a batch touches, and who sends which of them: the exchange itself runs in tests/distributed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanogpt.optim.row_table import RowExchange, TouchedRows

ROWS = 240
CPU = torch.device("cpu")


def exchanges(size: int, slots: list[np.ndarray], choice: str = "sparse") -> list[RowExchange | None]:
    found = []
    for rank in range(size):
        touched = TouchedRows(ROWS, "rows", rank, size, choice, CPU)  # type: ignore[arg-type]
        for first in range(0, len(slots), 8):  # steps of eight slots
            touched.add(slots[first : first + 8])
        touched.prepare()
        found.append(touched.take())
    return found


@pytest.mark.parametrize("size", [2, 4, 8])
def test_what_one_sends_another_gets(size: int) -> None:
    rng = np.random.default_rng(size)
    slots = [np.unique(rng.integers(0, ROWS, 15)) for _ in range(16)]
    found = exchanges(size, slots)
    shard = ROWS // size
    for rank, exchange in enumerate(found):
        assert exchange is not None
        own = set(np.concatenate([rows for slot, rows in enumerate(slots) if slot % size == rank]).tolist())
        sent = exchange.send_rows.split(exchange.send_counts)
        assert [row for rows in sent for row in rows.tolist()] == sorted(row for row in own if row // shard != rank)
        for owner, rows in enumerate(sent):
            assert all(row // shard == owner for row in rows.tolist())
            theirs = found[owner]
            assert theirs is not None
            got = theirs.receive_rows.split(theirs.receive_counts)[rank]
            assert (got + owner * shard).tolist() == rows.tolist()


def test_auto_goes_by_what_would_travel_and_all_ranks_choose_alike() -> None:
    few, many = [np.arange(8) * 30] * 8, [np.arange(ROWS)] * 8
    assert all(exchange is not None for exchange in exchanges(4, few, "auto"))
    assert all(exchange is None for exchange in exchanges(4, many, "auto"))
    one_is_busy = [np.arange(ROWS) if slot == 3 else few[0] for slot in range(8)]
    assert all(exchange is None for exchange in exchanges(4, one_is_busy, "auto"))
    assert all(exchange is not None for exchange in exchanges(4, many, "sparse"))


def test_a_gradient_from_elsewhere_goes_the_dense_way_once() -> None:
    touched = TouchedRows(ROWS, "rows", 0, 2, "sparse", CPU)
    touched.add([np.array([1]), np.array([2])])
    touched.forget()  # a checkpoint's
    touched.prepare()
    assert touched.take() is None
    touched.clear()
    touched.add([np.array([1, 200]), np.array([2, 100])])
    touched.prepare()
    exchange = touched.take()
    assert exchange is not None
    assert (exchange.send_rows.tolist(), exchange.receive_rows.tolist()) == ([200], [2, 100])
