"""A spec's model and optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanogpt.models.language_model import Implementations, LanguageModel, make_model
from nanogpt.optim.communication import Communicator
from nanogpt.spec import RunSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    spec: RunSpec,
    *,
    device: torch.device | str,
    implementations: Implementations | None = None,
    communicator: Communicator | None = None,
    drawn: DrawnModel | None = None,
) -> LanguageModel:
    """The spec's model, its parameters drawn from the spec's seed, equal on every device and world size.

    `implementations`: of attention, MLP and head; by default the plain ones. `communicator`: of the ranks that share
    the model's pulled tables; None: one rank has all of them. `drawn`: of this spec and device, used if its
    implementations are these.
    """
    chosen = implementations or Implementations()
    if drawn is None or drawn.implementations != chosen:
        drawn = draw_model(spec, device=device, implementations=chosen)
    drawn.model.make_tables(communicator or Communicator(), device, plain=chosen.plain_kernels)
    return drawn.model


class DrawnModel(NamedTuple):
    """A model without its tables, and what it is made for."""

    implementations: Implementations
    model: LanguageModel


def draw_model(spec: RunSpec, *, device: torch.device | str, implementations: Implementations) -> DrawnModel:
    """The part of `build_model` that needs no other rank."""
    model = _make(spec, implementations)
    model.draw_parameters(torch.Generator().manual_seed(spec.training.seed))
    return DrawnModel(implementations, model.to(device))


def undrawn_model(spec: RunSpec, *, device: torch.device, implementations: Implementations) -> LanguageModel:
    """A model to compile with, as `build_model`'s but for its parameters: they are all 0."""
    model = _make(spec, implementations).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.make_tables(Communicator(), device, plain=implementations.plain_kernels)
    return model


def _make(spec: RunSpec, implementations: Implementations) -> LanguageModel:
    slots = spec.training.slots
    return make_model(
        spec.model,
        dtype=DTYPES[spec.runtime.dtype],
        max_tokens=max(
            spec.evaluation.micro_batch_tokens, *(stage.batch_tokens // slots for stage in spec.training.all_stages)
        ),
        implementations=implementations,
    )
