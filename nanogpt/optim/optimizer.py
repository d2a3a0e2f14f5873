"""What the trainer tells an optimizer about a step, and what it asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class StepRates:
    """The schedule's say in an optimizer step."""

    lr_factor: float  # multiplies every base learning rate
    momentum: float = 0.0  # NorMuon's mu
    adam_step: bool = True  # Adam's parameters step too; otherwise their gradients keep accumulating
    split: bool = False  # after this step embed and lm_head train apart


class Optimizer(Protocol):
    """An optimizer owns its model's gradients: `step` reduces, applies and clears them."""

    def step(self, rates: StepRates) -> None:
        """One step with the gradients that have accumulated on this rank."""

    def warm_up(self, world_size: int) -> None:
        """Compile what a rank of `world_size` would run in `step`, on one process; parameters and state stay."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state, independent of the world size: full tensors on every rank. Collective."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict` of any world size."""
