"""AdamW's spec. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from nanogpt.optim.optimizer_spec import BaseOptimizerSpec, Rates
from nanogpt.parameters import Decoupled
from nanogpt.spec_fields import NOT_COMPILED, Betas, NonNegative, Positive


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
        return Rates(lr_factor)
