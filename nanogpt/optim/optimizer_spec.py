"""What every optimizer's spec answers, so that nobody has to ask which optimizer it is. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from nanogpt.parameters import Parameter
from nanogpt.spec_fields import Problem, Strict


@dataclass(frozen=True)
class Rates:
    """The schedule's say in a step, of any optimizer; its own may say more."""

    lr_factor: float  # multiplies every base learning rate


class TableRates(NamedTuple):
    """The schedule's say in an update of a table of rows that is not a parameter of the model."""

    lr: float
    beta2: float
    decay: float  # lr^2 * weight decay
    eps: float


class BaseOptimizerSpec(Strict):
    """Base of the optimizers' specs."""

    trains: ClassVar[tuple[type, ...]]  # what `Parameter.train` may be for it to train a parameter

    kind: str

    @classmethod
    def defaults(cls, rows: Sequence[Parameter]) -> dict[str, Any]:
        """What a recipe leaves out, from a model's table of parameters; as a recipe would say it."""
        return {}

    def problems(
        self, rows: Sequence[Parameter], *, world_size: int, stages: int, total_steps: int
    ) -> Iterator[Problem]:
        """Cross-checks against a table that it can train; yields (path below `optimizer`, message)."""
        yield from ()

    @property
    def steps_between_updates(self) -> int:
        """Steps over which the gradients of a table of rows are summed before it is updated."""
        return 1

    def is_event(self, step: int) -> bool:
        """Whether `step` is the last of those over which a table's gradients are summed."""
        return True

    def table_rates(self, step: int, lr_factor: float) -> TableRates | None:
        """What holds for tables at the event `step`; None: it updates none but the model's parameters."""
        return None

    def warmup_steps(self, first_steps: Sequence[int]) -> list[int]:
        """Steps that compile something of their own, besides the first ones of the run and of its stages."""
        return []

    def rates(self, step: int, lr_factor: float, *, first_steps: Sequence[int], total_steps: int) -> Rates:
        """The schedule's say in the optimizer's `step`. first_steps: of each stage."""
        raise NotImplementedError

    def shortened(self, scaled: Callable[[int], int], total_steps: int) -> dict[str, Any]:
        """Its fields when the run is shortened to `total_steps`; `scaled` shortens a number of steps in proportion."""
        return self.model_dump()

    def updated_together(self, rows: Sequence[Parameter]) -> list[list[str]]:
        """The parameters of each compiled update, in any kind of step, whatever the order of the updates."""
        return []
