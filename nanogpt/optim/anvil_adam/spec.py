"""ANVIL and Adam side by side, with a cadence for tables: the spec, its checks and its schedule. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from nanogpt.optim.banks_and_adam_spec import BanksAndAdamRates, BanksAndAdamSpec, BanksSpec
from nanogpt.optim.optimizer_spec import TableRates
from nanogpt.parameters import Adam, Parameter
from nanogpt.spec_fields import (
    NOT_COMPILED,
    Beta,
    Count,
    Fraction,
    Index,
    Names,
    NonNegative,
    Positive,
    Problem,
    Strict,
)


class SlowMomentumSpec(Strict):
    """The second momentum: fed from step 0 on, blended into the update from `from_step` on."""

    beta: Beta
    from_step: Annotated[Index, NOT_COMPILED]
    fast_share: Annotated[Fraction, NOT_COMPILED] = Field(description="of the fast momentum in the blend; before it, 1")
    fast_beta: Annotated[Beta, NOT_COMPILED] = Field(
        description="of the fast momentum, from from_step on; before it, `momentum` of the step"
    )


class AnvilSpec(BanksSpec):
    """Two momenta, Polar Express, variance reduction by row, decay gated by the slow momentum."""

    slow_momentum: SlowMomentumSpec


class TablesSpec(Strict):
    """The cadence of tables of rows: they are updated at events, on gradients summed since the one before.

    From `from_step` on an event stands for then_every / every of the earlier ones: betas to that power, weight decay
    times it.
    """

    every: Count = Field(description="events are the last of every N steps")
    then_every: Count = Field(description="N from from_step on, a multiple of `every`")
    from_step: Annotated[Index, NOT_COMPILED] = Field(description="a multiple of then_every")
    groups: Annotated[Names, NOT_COMPILED] = Field(
        default=[], description="groups of Adam that are updated at events as well"
    )


class RowAdamSpec(Strict):
    """Adam of a table's rows, without momentum and with one second moment a row."""

    lr_mul: Annotated[Positive, NOT_COMPILED]
    beta2: Annotated[Beta, NOT_COMPILED]
    wd_mul: Annotated[NonNegative, NOT_COMPILED]
    eps: Positive


@dataclass(frozen=True)
class AnvilAdamRates(BanksAndAdamRates):
    """The schedule's say in a step."""

    fast_beta: float = 0.0
    fast_share: float = 1.0
    table: TableRates | None = None  # of tables that are not parameters


class AnvilAdamSpec(BanksAndAdamSpec):
    """Adam and ANVIL side by side, and a cadence for tables of rows.

    The groups and orders of a recipe that does not name them are those of the model's table of parameters.
    """

    bank_part: ClassVar[str] = "anvil"

    kind: Literal["anvil_adam"]
    anvil: AnvilSpec
    tables: TablesSpec
    row_adam: RowAdamSpec | None = Field(
        default=None, description="for tables that are not parameters of the model; null: it has none"
    )

    @classmethod
    def defaults(cls, rows: Sequence[Parameter]) -> dict[str, Any]:
        """The table as a recipe would say it."""
        cyclic = [row.name for row in rows if isinstance(row.train, Adam) and row.train.cyclic]
        return {**super().defaults(rows), "tables": {"groups": cyclic}}

    def problems(
        self, rows: Sequence[Parameter], *, world_size: int, stages: int, total_steps: int
    ) -> Iterator[Problem]:
        """Also cadences that do not fit into one another, and groups that cannot follow them."""
        yield from super().problems(rows, world_size=world_size, stages=stages, total_steps=total_steps)
        tables, tied = self.tables, {name for row in rows if row.tied_to for name in (row.name, row.tied_to)}
        may = [row.name for row in rows if isinstance(row.train, Adam) and row.name not in tied]
        for label in tables.groups:
            if label not in may:
                yield ("tables", "groups"), f"{label}: can be any of {', '.join(may)}"
        if tables.then_every % tables.every:
            yield ("tables", "then_every"), f"is {tables.then_every}, must be a multiple of every, {tables.every}"
        if tables.from_step % tables.then_every:
            yield (
                ("tables", "from_step"),
                f"is {tables.from_step}, must be a multiple of then_every, {tables.then_every}",
            )

    @property
    def cyclic_groups(self) -> Sequence[str]:
        """See the base."""
        return self.tables.groups

    @property
    def steps_between_updates(self) -> int:
        """Of Adam's parameters and tables together, once tables take longer."""
        return math.lcm(self.adam.every, self.tables.then_every)

    def is_event(self, step: int) -> bool:
        """The last step of a cycle of the tables."""
        every = self.tables.every * self.repeat(step)
        return step % every == every - 1

    def repeat(self, step: int) -> int:
        """How many of the first events one at `step` stands for."""
        return self.tables.then_every // self.tables.every if step >= self.tables.from_step else 1

    def table_rates(self, step: int, lr_factor: float) -> TableRates | None:
        """See the base."""
        row_adam, repeat = self.row_adam, self.repeat(step)
        if row_adam is None:
            return None
        lr = self.adam.lr * lr_factor * row_adam.lr_mul
        return TableRates(
            lr=lr,
            beta2=row_adam.beta2**repeat,
            decay=lr * lr * self.adam.weight_decay * row_adam.wd_mul * repeat,
            eps=row_adam.eps,
        )

    def warmup_steps(self, first_steps: Sequence[int]) -> list[int]:
        """Also the first event of the second cadence: betas are part of compiled code."""
        steps, tables = super().warmup_steps(first_steps), self.tables
        if tables.groups and tables.then_every > tables.every:
            steps.append(tables.from_step + tables.then_every - 1)
        return steps

    def rates(self, step: int, lr_factor: float, *, first_steps: Sequence[int], total_steps: int) -> AnvilAdamRates:
        """See the base."""
        shared = super().rates(step, lr_factor, first_steps=first_steps, total_steps=total_steps)
        slow = self.anvil.slow_momentum
        blends = step >= slow.from_step
        return AnvilAdamRates(
            **{**vars(shared), "repeat": self.repeat(step)},
            fast_beta=slow.fast_beta if blends else shared.momentum,
            fast_share=slow.fast_share if blends else 1.0,
            table=self.table_rates(step, lr_factor),
        )

    def shortened(self, scaled: Callable[[int], int], total_steps: int) -> dict[str, Any]:
        """The blend and the second cadence also start at their shares of the run."""
        data = super().shortened(scaled, total_steps)
        for part in (data["anvil"]["slow_momentum"], data["tables"]):
            part["from_step"] = scaled(part["from_step"])
        unit = self.tables.then_every
        data["tables"]["from_step"] = round(data["tables"]["from_step"] / unit) * unit
        return data
