"""What every optimizer's spec answers, so that nobody has to ask which optimizer it is. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nanogpt.parameters import Parameter
from nanogpt.spec_fields import Problem, Strict

if TYPE_CHECKING:
    from torch import nn

    from nanogpt.optim.communication import Communicator
    from nanogpt.optim.optimizer import Optimizer, Rates
    from nanogpt.optim.row_table import TouchedRows


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

    def rates(self, step: int, lr_factor: float, *, first_steps: Sequence[int], total_steps: int) -> Rates:
        """The schedule's say in the optimizer's `step`. first_steps: of each stage."""
        raise NotImplementedError

    def shortened(self, scaled: Callable[[int], int], total_steps: int) -> dict[str, Any]:
        """Its fields when the run is shortened to `total_steps`; `scaled` shortens a number of steps in proportion."""
        return self.model_dump()

    def updated_together(self, rows: Sequence[Parameter]) -> list[list[str]]:
        """The parameters of each compiled update, in any kind of step, whatever the order of the updates."""
        return []

    def build(
        self,
        model: nn.Module,
        rows: Sequence[Parameter],
        communicator: Communicator,
        *,
        compiled: bool = False,
        plain_kernels: bool = False,
        touched: dict[str, TouchedRows] | None = None,
        keep_gradients: bool = False,
    ) -> Optimizer:
        """The optimizer of `model`, whose parameters are those of the table `rows`.

        compiled: the update formulas go through torch.compile. plain_kernels: plain PyTorch also where a Triton kernel
        could run. touched: the rows of each table that is exchanged by rows. keep_gradients: clear them in place.
        """
        raise NotImplementedError
