"""A run's pulled tables (`nanogpt.optim.pulled_table`): whether they fit, and when their cycles begin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.data.training_batches import StepRequest, TrainBatches
from nanogpt.errors import InputError
from nanogpt.launch.world import World
from nanogpt.models.language_model import LanguageModel
from nanogpt.models.model_spec import PulledTableSpec
from nanogpt.optim.pulled_table import ROW_STATE_BYTES
from nanogpt.spec import RunSpec
from nanogpt.training.build import DTYPES
from nanogpt.training.schedule import Schedule, StepSettings

USABLE = 0.96  # of a device's memory: the rest is for the driver and the allocator
EVALUATED_ROWS = 32_768  # tokens whose logits a validation holds at a time
ROW_SHARE = 16  # suggested tables have a multiple of this many rows, so that eight ranks share each half


class TableCycles:
    """Begins the cycles of the model's tables before the steps that read them."""

    def __init__(self, spec: RunSpec, schedule: Schedule, model: LanguageModel, batches: TrainBatches):
        self.is_event = spec.optimizer.is_event
        self._expected: int | None = None  # the step that continues with the cycle
        self.schedule = schedule
        self.ranks = spec.world_size
        self.tables = model.tables
        self.batches = batches

    def before(self, settings: StepSettings, *, alone: bool) -> None:
        """If a cycle begins with this step, pull what it will read, and have the next one's batches built; collective.

        A jump to another step also begins a cycle, as in benchmarks. alone: so does the next step, as in
        the warm-up, without looking ahead.
        """
        goes_on = settings.step == self._expected and all(table.in_cycle for table in self.tables.values())
        self._expected = None if alone else settings.step + 1
        if not self.tables or goes_on:
            return
        cycle = range(settings.step, settings.step + 1) if alone else self._cycle_from(settings.step)
        requests = self._requests(cycle)
        lists = self.batches.look_ahead(requests)
        tokens = sum(request.batch_tokens for request in requests) // self.ranks
        for name, table in self.tables.items():
            table.begin_cycle(lists[name], tokens)
        if not alone and cycle.stop < self.schedule.total_steps:
            self.batches.gather_ahead(requests + self._requests(self._cycle_from(cycle.stop)), len(requests))

    def before_update(self, settings: StepSettings, *, alone: bool) -> None:
        """If a cycle ends with this step, whose batch has been taken, say what the next one will read."""
        following = settings.step + 1
        if alone or not self.tables or not self.is_event(settings.step) or following == self.schedule.total_steps:
            return
        lists = self.batches.look_ahead(self._requests(self._cycle_from(following)))
        for name, table in self.tables.items():
            table.will_read(lists[name])

    def _cycle_from(self, first: int) -> range:
        """The steps from `first` to the next update, or to the run's end."""
        last = first
        while last + 1 < self.schedule.total_steps and not self.is_event(last):
            last += 1
        return range(first, last + 1)

    def _requests(self, steps: range) -> list[StepRequest]:
        return [self.schedule.at(step).request for step in steps]


@contextmanager
def rows_of(model: LanguageModel, batch: MicroBatch) -> Iterator[tuple[torch.Tensor, ...] | None]:
    """Pull what a validation batch reads from the model's tables; collective. Yields all that it looks up, or None."""
    with ExitStack() as stack:
        for name, table in model.tables.items():
            extras = model.table_specs[name].extras
            stack.enter_context(table.reading([batch.extras[extra] for extra in extras]))
        yield tuple(look_up.read() for look_up in model.look_ups(batch)) if model.tables else None


def check_tables_fit(spec: RunSpec, world: World) -> None:
    """Refuse tables that do not fit the memory of the run's devices, before anything is allocated.

    Raises `InputError` with the largest that fit.
    """
    tables = spec.model.pulled_tables()
    if not tables:
        return
    memory, device = _memory(world)
    other = bytes_beside_tables(spec)
    for name, table in tables.items():
        row = _row_bytes(spec, table)
        needed = table.rows * row / world.size
        room = USABLE * memory - other
        if needed > room:
            largest = int(max(room, 0) * world.size / row) // ROW_SHARE * ROW_SHARE
            way_out = f"set model.{table.field} to {largest:,} or less, or" if largest else "these devices hold none:"
            raise InputError(
                f"model.{table.field}: the table {name} of {table.rows:,} rows takes {_gib(needed)} on each of"
                f" {world.size} devices, beside about {_gib(other)} of all else; {device} has {_gib(memory)}:"
                f" {way_out} take more of them (--on)"
            )


def table_bytes(spec: RunSpec) -> float:
    """What one rank holds of the run's pulled tables."""
    row_bytes = (table.rows * _row_bytes(spec, table) for table in spec.model.pulled_tables().values())
    return sum(row_bytes) / spec.world_size


def bytes_beside_tables(spec: RunSpec) -> float:
    """Roughly what a rank needs besides its tables: 38 GB for record 92 on one H200.

    Parameters with gradients, optimizer state and averages; activations, twenty times the stream's size per layer;
    logits; the gradients of a cycle's tokens, and as much again for what is made from them at its end.
    """
    model, size = spec.model, spec.world_size
    number = DTYPES[spec.runtime.dtype].itemsize
    stages = spec.training.all_stages
    tokens = max(stage.batch_tokens for stage in stages) // spec.training.slots
    read = sum(table.reads * table.width for table in model.pulled_tables().values())  # numbers, for a token
    cycle = spec.accumulation_steps * tokens * spec.optimizer.steps_between_updates
    parameters = sum(row.size for row in model.parameters())
    return (
        parameters * (2 * number + 12 / size)
        + tokens * model.width * model.layers * 20 * number
        + tokens * model.padded_vocab_size * number
        + min(EVALUATED_ROWS, spec.evaluation.micro_batch_tokens) * model.padded_vocab_size * 4
        + cycle * read * 4 / 2
    )


def _row_bytes(spec: RunSpec, table: PulledTableSpec) -> int:
    return table.width * DTYPES[spec.runtime.dtype].itemsize + ROW_STATE_BYTES


def _memory(world: World) -> tuple[float, str]:
    """Bytes of the device's memory (a CPU's is shared by its ranks), and its name."""
    if world.device.type == "cuda":
        found = torch.cuda.get_device_properties(world.device)
        return float(found.total_memory), found.name
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / world.size, "this machine"


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
