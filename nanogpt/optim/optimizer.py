"""The interface between trainer and optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from nanogpt.optim import OPTIMIZERS
from nanogpt.optim.communication import Communicator
from nanogpt.optim.optimizer_spec import BaseOptimizerSpec
from nanogpt.optim.row_table import Rows, TouchedRows
from nanogpt.parameters import Parameter
from nanogpt.registry import built_class


class Optimizer(Protocol):
    """An optimizer owns its model's gradients: `step` reduces, applies and clears them."""

    def expect_rows(self, rows: Mapping[str, Sequence[Rows]], rates: Any) -> None:
        """Note the rows that the step's batch reads, by extra; for each slot, all ranks' in order."""

    def step(self, rates: Any) -> None:
        """Take a step with the gradients accumulated on this rank. rates: from the spec's `rates`."""

    def warm_up(self, world_size: int) -> None:
        """Compile what a rank of `world_size` would run in `step`, on one process; parameters and state stay."""

    def lines(self) -> list[str]:
        """What of it was captured as CUDA graphs, for the log."""

    def state_dict(self) -> dict[str, Any]:
        """The full state, independent of the world size: full tensors on every rank. Collective."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict` of any world size."""


def build_optimizer(
    spec: BaseOptimizerSpec,
    model: nn.Module,
    rows: Sequence[Parameter],
    communicator: Communicator,
    *,
    compiled: bool = False,
    plain_kernels: bool = False,
    touched: dict[str, TouchedRows] | None = None,
    capture: bool = False,
    tables: Mapping[str, Any] | None = None,
) -> Optimizer:
    """The spec's optimizer for `model`, whose parameters are those of the table `rows`.

    compiled: the update formulas go through torch.compile. plain_kernels: plain PyTorch also where a Triton kernel
    could run. touched: by parameter, the rows of tables that are exchanged by rows. capture: replay updates as CUDA
    graphs, and clear gradients in place. tables: by name, tables that are not parameters of the model. Optimizers
    ignore what they have no use for.
    """
    kind = built_class(OPTIMIZERS, spec)
    optimizer: Optimizer = kind(
        model,
        rows,
        spec,
        communicator,
        compiled=compiled,
        plain_kernels=plain_kernels,
        touched=touched,
        capture=capture,
        tables=tables,
    )
    return optimizer
