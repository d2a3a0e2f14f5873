"""Update formulas (adam, normuon, polar_express), who sends what when (plan, communication), and both at work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanogpt.spec import AdamWSpec, RunSpec

if TYPE_CHECKING:
    from nanogpt.models.language_model import LanguageModel
    from nanogpt.optim.communication import Communicator
    from nanogpt.optim.optimizer import Optimizer
    from nanogpt.optim.sparse import TouchedRows


def build_optimizer(
    spec: RunSpec,
    model: LanguageModel,
    communicator: Communicator,
    *,
    compiled: bool = False,
    plain_kernels: bool = False,
    touched: TouchedRows | None = None,
    keep_gradients: bool = False,
) -> Optimizer:
    """The spec's optimizer for `model`. `compiled`: the update formulas go through torch.compile.

    `plain_kernels`: plain PyTorch also where a Triton kernel could run. `touched`: of the bigram table.
    `keep_gradients`: clear them in place; for the record models.
    """
    from nanogpt.optim.adamw import AdamW
    from nanogpt.optim.normuon_adam import NorMuonAdam

    if isinstance(spec.optimizer, AdamWSpec):
        return AdamW(model, spec.optimizer, communicator)
    return NorMuonAdam(
        model,
        spec.optimizer,
        communicator,
        compiled=compiled,
        plain_kernels=plain_kernels,
        touched=touched,
        keep_gradients=keep_gradients,
    )
