"""When a run's pulled tables begin their cycles, and which are refused for lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanogpt.data.training_batches import StepRequest
from nanogpt.errors import InputError
from nanogpt.recipe import load_recipe
from nanogpt.spec import RunSpec
from nanogpt.training import tables
from nanogpt.training.schedule import Schedule
from nanogpt.training.tables import TableCycles, bytes_beside_tables, check_tables_fit
from nanogpt.training.trainer import Trainer

H200, H100 = 150_754_820_096, 85_017_624_576  # bytes that PyTorch reports


class Table:
    """Notes the rows that its cycles begin with."""

    def __init__(self) -> None:
        self.in_cycle = False
        self.begun: list[Any] = []
        self.announced: list[Any] = []

    def begin_cycle(self, rows: Any, tokens: int) -> None:
        assert tokens == sum(rows) / 8  # all that this rank's slots have
        self.in_cycle = True
        self.begun.append(rows)

    def will_read(self, rows: Any) -> None:
        self.announced.append(rows)


def record92(gpu: str, count: int, *settings: str, recipe: str = "record92") -> RunSpec:
    return load_recipe(recipe, [f"hardware.gpu={gpu}", f"hardware.gpus_per_node={count}", *settings])


class Batches:
    """The table's rows are the tokens of each step that was looked ahead to."""

    def __init__(self) -> None:
        self.prepared: list[list[int]] = []

    def look_ahead(self, requests: list[StepRequest]) -> dict[str, list[int]]:
        return {"rows": [request.batch_tokens for request in requests]}

    def gather_ahead(self, requests: list[StepRequest], first: int) -> None:
        self.prepared.append([request.batch_tokens for request in requests[first:]])


def make_cycles(spec: RunSpec) -> tuple[TableCycles, Table, Batches]:
    table, batches = Table(), Batches()
    model = SimpleNamespace(tables={"rows": table})
    return TableCycles(spec, Schedule(spec), model, batches), table, batches  # type: ignore[arg-type]


def test_a_cycle_reaches_to_the_next_update_across_stages() -> None:
    spec = record92("h100", 8)
    schedule, (cycles, table, batches) = Schedule(spec), make_cycles(spec)
    lengths = []
    for step in range(schedule.total_steps):
        before = len(table.begun)
        cycles.before(schedule.at(step), alone=False)
        if len(table.begun) > before:
            lengths.append((step, table.begun[-1]))
        assert table.begun[1:] == table.announced
        cycles.before_update(schedule.at(step), alone=False)
        assert len(table.announced) - len(table.begun) == (0 if spec.optimizer.is_event(step) else -1)
        if spec.optimizer.is_event(step):
            table.in_cycle = False
    assert [step for step, _ in lengths] == [*range(0, 336, 2), *range(336, 1192, 4), 1192]
    assert lengths[0][1] == [131072] * 2 and lengths[-1][1] == [131072] * 2  # the last one is never finished
    assert dict(lengths)[680] == [262144, 393216, 393216, 393216]
    assert batches.prepared == table.begun[1:]


def test_a_step_of_the_warm_up_is_a_cycle_of_its_own() -> None:
    spec = record92("h100", 8)
    schedule, (cycles, table, batches) = Schedule(spec), make_cycles(spec)
    for step in (0, 1, 681):
        cycles.before(schedule.at(step), alone=True)
        cycles.before_update(schedule.at(step), alone=True)
    assert table.begun == [[131072], [131072], [393216]] and not batches.prepared + table.announced


def test_a_step_out_of_its_order_begins_a_cycle() -> None:
    spec = record92("h100", 8)
    schedule, (cycles, table, batches) = Schedule(spec), make_cycles(spec)
    for step in (340, 341, 700, 701, 340):
        cycles.before(schedule.at(step), alone=False)
    assert table.begun == batches.prepared == [[262144] * 4, [393216] * 4, [262144] * 4]


def test_without_tables_nothing_is_looked_ahead_to() -> None:
    spec = record92("h100", 8)
    cycles = TableCycles(spec, Schedule(spec), SimpleNamespace(tables={}), None)  # type: ignore[arg-type]
    for step in (0, 1):
        cycles.before(Schedule(spec).at(step), alone=False)
        cycles.before_update(Schedule(spec).at(step), alone=False)


@pytest.mark.parametrize(
    ("recipe", "gpu", "count", "memory", "fits"),
    [
        ("record92", "h100", 8, H100, True),
        ("record92", "h100", 4, H100, True),
        ("record92", "h100", 2, H100, False),
        ("record92", "h200", 2, H200, True),
        ("record92", "h200", 1, H200, False),
        ("record92-quarter-table", "h200", 1, H200, True),
        ("record92-quarter-table", "h100", 1, H100, True),
        ("record92", "h100", 1, H100, False),
    ],
)
def test_tables_fit_where_the_specification_says(
    monkeypatch: pytest.MonkeyPatch, recipe: str, gpu: str, count: int, memory: int, fits: bool
) -> None:
    monkeypatch.setattr(tables, "_memory", lambda world: (float(memory), "the GPU"))
    world: Any = SimpleNamespace(size=count, device=torch.device("cuda"))
    spec = record92(gpu, count, recipe=recipe)
    if fits:
        check_tables_fit(spec, world)
        return
    with pytest.raises(InputError, match=r"model.ngram_rows: the table ngrams of 84,602,880 rows takes") as refused:
        check_tables_fit(spec, world)
    largest = int(str(refused.value).split("set model.ngram_rows to ")[1].split(" or less")[0].replace(",", ""))
    assert largest % 16 == 0 and largest < spec.model.ngram_rows
    check_tables_fit(record92(gpu, count, f"model.ngram_rows={largest}"), world)
    with pytest.raises(InputError, match="or less"):
        check_tables_fit(record92(gpu, count, f"model.ngram_rows={largest + 160}"), world)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.ngram_rows=1002", r"model\.ngram_rows: is 1,002, which 8 ranks cannot share evenly"),
        ("optimizer.row_adam=null", r"would never update the table ngrams: it takes an optimizer with row_adam"),
    ],
)
def test_a_table_that_nobody_could_train_is_refused(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        record92("h100", 8, setting)


def test_what_stands_beside_the_table_is_about_what_was_measured() -> None:
    """38 GiB on one rank, 32 on one of eight (record92's specification, of the public code)."""
    assert bytes_beside_tables(record92("h200", 1)) / 2**30 == pytest.approx(38, abs=4)
    assert bytes_beside_tables(record92("h200", 8)) / 2**30 == pytest.approx(30, abs=4)


def test_a_cpu_shares_its_memory() -> None:
    world: Any = SimpleNamespace(size=8, device=torch.device("cpu"))
    with pytest.raises(InputError, match="this machine has"):
        check_tables_fit(record92("cpu", 8, "model.ngram_rows=2147483632"), world)
    assert np.isfinite(tables._memory(world)[0])


def test_one_rank_reads_nothing_ahead_of_the_last_validation():
    """Its rows are where they are; the clock would run meanwhile."""

    def batches() -> Iterator[None]:
        read.append(1)
        yield from ()

    read: list[int] = []
    for size in (1, 2):
        place = SimpleNamespace(val_batches=batches(), model=SimpleNamespace(tables={"rows": Table()}))
        place.world = SimpleNamespace(size=size)
        Trainer._read_for_validation(place)  # type: ignore[arg-type]
    assert len(read) == 1
