"""What every optimizer's spec answers, so that no other code needs to know which optimizer it is. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from nanogpt.parameters import Parameter
from nanogpt.spec_fields import Problem, Strict


@dataclass(frozen=True)
class Rates:
    """A step's part of the schedule for any optimizer; its own may add more."""

    lr_factor: float  # multiplies every base learning rate


class TableRates(NamedTuple):
    """The schedule's part for updating a table that is not a parameter of the model."""

    lr: float
    beta2: float
    decay: float  # lr^2 * weight decay
    eps: float


class BaseOptimizerSpec(Strict):
    """Base of the optimizers' specs."""

    trains: ClassVar[tuple[type, ...]]  # the types of `Parameter.train` that it can train

    kind: str

    @classmethod
    def defaults(cls, rows: Sequence[Parameter]) -> dict[str, Any]:
        """Defaults from a model's table of parameters, in a recipe's form."""
        return {}

    def problems(
        self, rows: Sequence[Parameter], *, world_size: int, stages: int, total_steps: int
    ) -> Iterator[Problem]:
        """Cross-checks against a trainable table; yields (path below `optimizer`, message)."""
        yield from ()

    @property
    def steps_between_updates(self) -> int:
        """Steps over which a table's gradients are summed before it is updated."""
        return 1

    def is_event(self, step: int) -> bool:
        """Whether `step` is the last of those over which a table's gradients are summed."""
        return True

    def table_rates(self, step: int, lr_factor: float) -> TableRates | None:
        """The rates for tables at the event `step`; None: it updates only the model's parameters."""
        return None

    def warmup_steps(self, first_steps: Sequence[int]) -> list[int]:
        """Steps that compile something new, besides the first ones of the run and of its stages."""
        return []

    def rates(self, step: int, lr_factor: float, *, first_steps: Sequence[int], total_steps: int) -> Rates:
        """The schedule's part for the optimizer's `step`. first_steps: of each stage."""
        raise NotImplementedError

    def shortened(self, scaled: Callable[[int], int], total_steps: int) -> dict[str, Any]:
        """Its fields for a run shortened to `total_steps`; `scaled` shortens a number of steps in proportion."""
        return self.model_dump()

    def updated_together(self, rows: Sequence[Parameter]) -> list[list[str]]:
        """The parameters of each compiled update, in any kind of step, regardless of the order of updates."""
        return []
