"""A spec's model and optimizer."""

from __future__ import annotations

import torch

from nanogpt.models import language_model
from nanogpt.models.language_model import Implementations, LanguageModel
from nanogpt.optim.communication import Communicator
from nanogpt.spec import RunSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    spec: RunSpec,
    *,
    device: torch.device | str,
    implementations: Implementations | None = None,
    communicator: Communicator | None = None,
) -> LanguageModel:
    """The spec's model, its parameters drawn from the spec's seed, equal on every device and world size.

    `implementations`: of attention, MLP and head; by default the plain ones. `communicator`: of the ranks that share
    the model's pulled tables.
    """
    slots = spec.training.slots
    return language_model.build_model(
        spec.model,
        seed=spec.training.seed,
        dtype=DTYPES[spec.runtime.dtype],
        max_tokens=max(
            spec.evaluation.micro_batch_tokens, *(stage.batch_tokens // slots for stage in spec.training.all_stages)
        ),
        device=device,
        implementations=implementations,
        communicator=communicator,
    )
