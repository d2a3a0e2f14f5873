"""What the trainer tells an optimizer about a step, and what it asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nanogpt.optim.row_table import Rows


@dataclass(frozen=True)
class Rates:
    """The schedule's say in a step, of any optimizer; its own may say more."""

    lr_factor: float  # multiplies every base learning rate


class Optimizer(Protocol):
    """An optimizer owns its model's gradients: `step` reduces, applies and clears them."""

    def expect_rows(self, rows: Mapping[str, Sequence[Rows]], rates: Any) -> None:
        """The step's batch reads these rows, by the extra that has them; of each slot, all ranks' in order."""

    def step(self, rates: Any) -> None:
        """One step with the gradients that have accumulated on this rank. rates: of the spec's `rates`."""

    def warm_up(self, world_size: int) -> None:
        """Compile what a rank of `world_size` would run in `step`, on one process; parameters and state stay."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state, independent of the world size: full tensors on every rank. Collective."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict` of any world size."""
