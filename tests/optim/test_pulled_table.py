"""A pulled table of rows on one rank against row Adam as its definition reads; for several see tests/distributed."""

from __future__ import annotations

import math

import pytest
import torch
from pulls import lists_of

from nanogpt.errors import InputError
from nanogpt.kernels.table_rows import Signs
from nanogpt.optim.communication import Communicator, RankOf
from nanogpt.optim.optimizer_spec import TableRates
from nanogpt.optim.pulled_table import PulledTable

ROWS, WIDTH = 50, 6
CPU = torch.device("cpu")


def begin(table: PulledTable, *rows: list[int] | torch.Tensor, tokens: int) -> None:
    """A cycle whose tokens read `rows`."""
    table.begin_cycle(lists_of([torch.as_tensor(read).numpy() for read in rows], rows=ROWS), tokens)


def make_table(dtype: torch.dtype = torch.float32) -> PulledTable:
    return PulledTable(ROWS, WIDTH, dtype=dtype, communicator=Communicator(), device=CPU)


def cycles(count: int, seed: int = 0) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Cycles of three micro-batches each: (1, T) rows, repeated ones among them, and their gradients (T, D)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        hot = torch.randint(0, ROWS, (12,), generator=generator)  # most rows are missed by most cycles
        picks = [hot[torch.randint(0, 12, (1, 9), generator=generator)] for _ in range(3)]
        found.append([(rows, torch.randn(9, WIDTH, generator=generator)) for rows in picks])
    return found


def rates_of(number: int) -> TableRates:
    """Of update `number`, from 1; the betas and decay change on the way, as the record's do."""
    lr = 0.05 / number
    beta2, decay = (0.95, 5) if number < 4 else (0.9025, 10)
    return TableRates(lr, beta2, lr * lr * decay, 1e-10)


def run_cycle(table: PulledTable, cycle: list[tuple[torch.Tensor, torch.Tensor]], number: int) -> None:
    begin(table, *(rows for rows, _ in cycle), tokens=sum(len(g) for _, g in cycle))
    for rows, gradient in cycle:
        table.add_gradient(rows, gradient)
    table.start_push()
    table.update(rates_of(number))


def definition(all_cycles: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> tuple[torch.Tensor, list[float]]:
    """Values and second moments by a loop over rows and updates in fp64, every row's moment decaying each time."""
    p = [[0.0] * WIDTH for _ in range(ROWS)]
    v = [0.0] * ROWS
    for number, cycle in enumerate(all_cycles, start=1):
        lr, beta2, decay, eps = rates_of(number)
        g: dict[int, list[float]] = {}
        for rows, gradient in cycle:
            for row, numbers in zip(rows[0].tolist(), gradient.double().tolist(), strict=True):
                g[row] = [a + b for a, b in zip(g.get(row, [0.0] * WIDTH), numbers, strict=True)]
        for row in range(ROWS):
            v[row] *= beta2
            if row in g:
                v[row] += (1 - beta2) * sum(x * x for x in g[row]) / WIDTH
                for c in range(WIDTH):
                    u = g[row][c] / (math.sqrt(v[row]) + eps) * lr * math.sqrt(1 - beta2**number)
                    if u * p[row][c] > 0:
                        u += p[row][c] * decay
                    p[row][c] -= u
    return torch.tensor(p), v


def test_rows_are_trained_as_the_definition_says() -> None:
    table, all_cycles = make_table(), cycles(9)
    for number, cycle in enumerate(all_cycles, start=1):
        run_cycle(table, cycle, number)
    values, moments = definition(all_cycles)
    assert torch.allclose(table.values, values, rtol=2e-5, atol=1e-7)
    assert (values == 0).all(1).sum() > 0, "every row was touched: the test says nothing of those that are not"
    betas = [rates_of(number).beta2 for number in range(1, 10)]
    for row, last in enumerate(table.last_update.tolist()):
        paid = float(table.second_moment[row]) * math.prod(betas[last:])
        assert paid == pytest.approx(moments[row], rel=1e-5)


def test_a_token_reads_several_rows_each_with_its_signs() -> None:
    table, twin = make_table(), make_table()
    signs = Signs(torch.tensor([[1.0] * WIDTH, [-1.0, 1.0] * (WIDTH // 2)]), torch.tensor([[0, 1], [1, 1]]))
    rows, gradient = torch.tensor([[3, 5], [7, 5]]), torch.randn(2, WIDTH)
    for each in (table, twin):
        begin(each, [3, 5, 7], tokens=4)
    table.add_gradient(rows, gradient, signs)
    for read, vectors in zip(rows, signs.rows, strict=True):
        twin.add_gradient(read[None], gradient * signs.vectors[vectors])
    assert table.gradient is not None and twin.gradient is not None
    assert torch.allclose(table.gradient, twin.gradient)
    for each in (table, twin):
        each.start_push()
        each.update(rates_of(1))
    assert torch.allclose(table.values, twin.values) and table.values.any(1).sum() == 3
    expected = sum(table.values[read] * signs.vectors[vectors] for read, vectors in zip(rows, signs.rows, strict=True))
    assert torch.equal(table.read(rows, signs), expected)


def test_a_row_that_no_token_has_read_stays() -> None:
    table = make_table()
    run_cycle(table, [(torch.tensor([[3, 5, 3]]), torch.ones(3, WIDTH))], 1)
    before = table.values.clone()
    run_cycle(table, [(torch.tensor([[5]]), torch.ones(1, WIDTH))], 2)
    assert torch.equal(table.values[3], before[3]) and not torch.equal(table.values[5], before[5])
    assert not table.values[4].any()


def test_a_checkpoint_in_the_middle_of_a_cycle_goes_on_bit_for_bit() -> None:
    all_cycles = cycles(4)
    tables = [make_table(torch.bfloat16) for _ in range(2)]
    for number, cycle in enumerate(all_cycles[:3], start=1):
        for table in tables:
            run_cycle(table, cycle, number)
    first, second, third = all_cycles[3]
    for table in tables:
        begin(table, first[0], second[0], third[0], tokens=27)
        table.add_gradient(*first)
    saved = tables[1].state_dict()
    assert set(saved["rows"].tolist()) == set(tables[0].last_update.nonzero().flatten().tolist())
    tables[1] = make_table(torch.bfloat16)
    tables[1].load_state_dict(saved)
    begin(tables[1], second[0], third[0], tokens=18)
    for table in tables:
        table.add_gradient(*second)
        table.add_gradient(*third)
        table.start_push()
        table.update(rates_of(4))
    for name in ("values", "second_moment", "last_update"):
        assert torch.equal(getattr(tables[0], name), getattr(tables[1], name)), name
    assert tables[0].decays == tables[1].decays


def test_a_cycle_cut_by_an_earlier_version_is_refused() -> None:
    state = make_table().state_dict() | {"cycles": [{"rows": torch.tensor([1]), "gradient": torch.ones(1, WIDTH)}]}
    with pytest.raises(InputError, match="step within a cycle of tables, by an earlier version"):
        make_table().load_state_dict(state)


def test_a_fresh_state_clears_all() -> None:
    table = make_table()
    fresh = table.state_dict()
    run_cycle(table, cycles(1)[0], 1)
    table.load_state_dict(fresh)
    assert not table.values.any() and not table.second_moment.any() and not table.last_update.any()
    assert not table.decays and not table.in_cycle


def test_reading_other_rows_leaves_the_cycle() -> None:
    table = make_table()
    run_cycle(table, [(torch.tensor([[1, 2]]), torch.randn(2, WIDTH))], 1)
    begin(table, [1], tokens=1)
    table.add_gradient(torch.tensor([[1]]), torch.ones(1, WIDTH))
    with table.reading([torch.tensor([4, 2, 4], dtype=torch.int32)]):
        assert torch.equal(table.read(torch.tensor([[4, 2, 4]])), table.values[[4, 2, 4]])
    table.start_push()
    table.update(rates_of(2))
    assert int(table.last_update[2]) == 1 and int(table.last_update[1]) == 2


def test_an_idle_table_has_zeros_and_no_memory() -> None:
    table = make_table()
    with table.idle():
        assert not table.read(torch.tensor([[3, 4]])).any()
        table.add_gradient(torch.tensor([[3]]), torch.ones(1, WIDTH))
    assert "values" not in vars(table) and not table.in_cycle
    run_cycle(table, [(torch.tensor([[3]]), torch.ones(1, WIDTH))], 1)
    assert table.read(torch.tensor([[3]])).any()


def test_what_has_no_cycle_is_refused() -> None:
    table = make_table()
    with pytest.raises(RuntimeError, match="outside a cycle"):
        table.add_gradient(torch.tensor([[1]]), torch.ones(1, WIDTH))
    with pytest.raises(RuntimeError, match="outside a cycle"):
        table.start_push()
    begin(table, [1], tokens=2)
    table.add_gradient(torch.tensor([[1]]), torch.ones(1, WIDTH))
    with pytest.raises(RuntimeError, match="room for 2 tokens, and gets 3"):
        table.add_gradient(torch.tensor([[1, 1]]), torch.ones(2, WIDTH))
    with pytest.raises(ValueError, match="50 rows of a table cannot be shared evenly by 4 ranks"):
        PulledTable(ROWS, WIDTH, dtype=torch.float32, communicator=RankOf(4), device=CPU)
