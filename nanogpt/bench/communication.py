"""The gradient of a table of rows, exchanged whole or by the rows that were touched: `nanogpt bench communication`.

Collectives of real sizes on real ranks, with nothing else running; what a training step gains is measured by
`nanogpt bench step` with runtime.row_gradients=dense and =sparse. Tokens are made up, with a Zipf-like spread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nanogpt.bench.conditions import conditions
from nanogpt.console import markdown_table
from nanogpt.launch.world import World
from nanogpt.models.model_spec import RowTableSpec, Slot
from nanogpt.optim.communication import Pending
from nanogpt.optim.row_table import RowExchange, TouchedRows, average_touched_shard
from nanogpt.spec import RunSpec
from nanogpt.training.build import DTYPES


@dataclass(frozen=True)
class TableTiming:
    """One stage; milliseconds per Adam step on the slowest rank."""

    stage: int
    touched: float  # share of the table's rows that a rank's tokens touch between two Adam steps, mean over ranks
    dense_ms: float
    sparse_ms: float
    host_ms: float  # for making the lists of rows, on the host
    dense_bytes: int  # sent by a rank
    sparse_bytes: int  # sent by the rank that sends the most
    error: float  # relative, of the sparse result against the dense one


def time_row_table(spec: RunSpec, table: RowTableSpec, world: World, *, repeats: int) -> Iterator[TableTiming]:
    """Time every stage, dense and sparse. Every rank calls it; the world size is above 1."""
    model, dtype = spec.model, DTYPES[spec.runtime.dtype]
    for index, stage in enumerate(spec.training.stages):
        slots = spec.training.slots * spec.optimizer.steps_between_updates
        rng = np.random.default_rng(index)
        bos = spec.data.bos
        rows = []
        for _ in range(slots):
            made_up = np.minimum(bos ** rng.random(stage.batch_tokens // spec.training.slots), bos - 1)
            tokens = made_up.astype(np.uint16)
            slot = Slot(tokens, np.roll(tokens, -1), stage, slots=spec.training.slots)
            rows.append(np.unique(model.batch_extras(slot).arrays[table.extra]))
        touched = TouchedRows(table.rows, table.extra, world.rank, world.size, "sparse", world.device)
        began = time.perf_counter()
        touched.add(rows)
        touched.prepare()
        host_ms = 1000 * (time.perf_counter() - began)
        exchange = touched.take()
        assert exchange is not None
        own = np.unique(np.concatenate(rows[world.rank :: world.size]))
        gradient = torch.zeros(table.rows, model.width, dtype=dtype, device=world.device)
        generator = torch.Generator(world.device).manual_seed(world.rank)
        at = torch.from_numpy(own).to(world.device)
        gradient[at] = torch.randn(own.size, model.width, generator=generator, device=world.device).to(dtype)

        dense = world.communicator.average_shard(gradient.clone()).wait()
        sparse = average_touched_shard(world.communicator, gradient.clone(), exchange).wait()
        error = float((sparse.float() - dense.float()).norm() / dense.float().norm())

        def start_sparse(full: torch.Tensor, exchange: RowExchange = exchange) -> Pending:
            return average_touched_shard(world.communicator, full, exchange)

        row_bytes = model.width * gradient.element_size()
        times = [
            _median_ms(world, gradient, start, repeats) for start in (world.communicator.average_shard, start_sparse)
        ]
        of_ranks = world.gather((*times, host_ms, sum(exchange.send_counts), own.size, error))
        dense_ms, sparse_ms, host, sent, _, worst = (max(values) for values in zip(*of_ranks, strict=True))
        yield TableTiming(
            stage=index,
            touched=sum(values[4] for values in of_ranks) / world.size / table.rows,
            dense_ms=dense_ms,
            sparse_ms=sparse_ms,
            host_ms=host,
            dense_bytes=gradient.shape[0] * (world.size - 1) // world.size * row_bytes,
            sparse_bytes=int(sent) * row_bytes,
            error=worst,
        )


def _median_ms(world: World, gradient: torch.Tensor, start: Callable[[torch.Tensor], Pending], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        full = gradient.clone()
        world.synchronize()
        world.communicator.barrier()
        began = time.perf_counter()
        start(full).wait()
        world.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def as_table(timings: Sequence[TableTiming]) -> str:
    """As Markdown."""
    head = (
        "stage",
        "rows touched",
        "dense, ms",
        "sparse, ms",
        "lists on the host, ms",
        "dense, MB",
        "sparse, MB",
        "error",
    )
    rows = [
        (
            t.stage + 1,
            f"{t.touched:.1%}",
            *(f"{ms:.2f}" for ms in (t.dense_ms, t.sparse_ms, t.host_ms)),
            *(f"{count / 1e6:.1f}" for count in (t.dense_bytes, t.sparse_bytes)),
            f"{t.error:.1e}",
        )
        for t in timings
    ]
    return "\n".join(markdown_table(head, rows))


def as_json(tables: Mapping[str, Sequence[TableTiming]], spec: RunSpec, world: World) -> dict[str, Any]:
    """The timings of each table, by its parameter's name, with what they depend on."""
    return {
        **conditions(spec, world),
        "tables": {name: [asdict(timing) for timing in timings] for name, timings in tables.items()},
    }
