"""A folder a model, and here the registry: one line a model. No torch.

A folder has `spec.py` (fields, the table of parameters, what others need to know of the model), `model.py`,
`definition.py` (the same as its definition reads, in fp64, for tests to compare with) and `README.md` (ideas, authors).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from nanogpt.registry import union_of

if TYPE_CHECKING:
    from nanogpt.models.model_spec import BaseModelSpec as ModelSpec

MODELS = (
    ("nanogpt.models.speedrun.spec:SpeedrunModelSpec", "nanogpt.models.speedrun.model:Speedrun"),
    ("nanogpt.models.record89.spec:Record89ModelSpec", "nanogpt.models.record89.model:Record89"),
    ("nanogpt.models.record92.spec:Record92ModelSpec", "nanogpt.models.record92.model:Record92"),
    ("nanogpt.models.gpt2.spec:Gpt2ModelSpec", "nanogpt.models.gpt2.model:Gpt2"),
)

if not TYPE_CHECKING:
    ModelSpec = Annotated[union_of(MODELS), Field(discriminator="kind")]
