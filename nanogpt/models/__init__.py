"""One file a model, readable from top to bottom; `build_model` makes the one that a spec names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nanogpt.spec import Gpt2ModelSpec, Record89ModelSpec, RunSpec

if TYPE_CHECKING:
    from nanogpt.models.language_model import Implementations, LanguageModel


def build_model(
    spec: RunSpec, *, device: torch.device | str, implementations: Implementations | None = None
) -> LanguageModel:
    """The spec's model with its parameters drawn from the spec's seed, alike on every device and world size.

    `implementations` chooses among the equal implementations of attention, MLP and head; the plain ones if not given.
    """
    from nanogpt.models.gpt2 import Gpt2
    from nanogpt.models.language_model import Implementations
    from nanogpt.models.record89 import Record89
    from nanogpt.models.speedrun import Speedrun

    implementations = implementations or Implementations()
    max_tokens = max(
        spec.evaluation.micro_batch_tokens, *(s.batch_tokens // spec.training.slots for s in spec.training.all_stages)
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.runtime.dtype]
    if isinstance(spec.model, Gpt2ModelSpec):
        model: LanguageModel = Gpt2(spec.model, dtype=dtype, implementations=implementations)
    elif isinstance(spec.model, Record89ModelSpec):
        model = Record89(spec.model, dtype=dtype, max_tokens=max_tokens, implementations=implementations)
    else:
        model = Speedrun(spec.model, dtype=dtype, max_tokens=max_tokens, implementations=implementations)
    model.draw_parameters(torch.Generator().manual_seed(spec.training.seed))
    return model.to(device)
