"""AdamW's spec. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from nanogpt.optim.optimizer_spec import BaseOptimizerSpec
from nanogpt.parameters import Decoupled, Parameter
from nanogpt.spec_fields import NOT_COMPILED, Betas, NonNegative, Positive

if TYPE_CHECKING:
    from torch import nn

    from nanogpt.optim.adamw.optimizer import AdamW
    from nanogpt.optim.communication import Communicator
    from nanogpt.optim.optimizer import Rates
    from nanogpt.optim.row_table import TouchedRows


class AdamWSpec(BaseOptimizerSpec):
    """AdamW as the GPT-2 baseline uses it: decoupled decay of matrices only, gradient clipping. Not compiled."""

    trains: ClassVar[tuple[type, ...]] = (Decoupled,)

    kind: Literal["adamw"]
    lr: Annotated[Positive, NOT_COMPILED]
    betas: Annotated[Betas, NOT_COMPILED]
    eps: Annotated[Positive, NOT_COMPILED]
    weight_decay: Annotated[NonNegative, NOT_COMPILED]
    clip_norm: Annotated[Positive | None, NOT_COMPILED] = Field(
        description="largest global gradient norm; null does not clip"
    )

    def rates(self, step: int, lr_factor: float, *, first_steps: Sequence[int], total_steps: int) -> Rates:
        """See the base."""
        from nanogpt.optim.optimizer import Rates

        return Rates(lr_factor)

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
    ) -> AdamW:
        """See the base; it has nothing to compile, and no table of rows."""
        from nanogpt.optim.adamw.optimizer import AdamW

        return AdamW(model, rows, self, communicator)
