"""Optimizers: a folder and a registry line for each kind, and the update formulas they share. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from nanogpt.registry import union_of

if TYPE_CHECKING:
    from nanogpt.optim.optimizer_spec import BaseOptimizerSpec as OptimizerSpec

OPTIMIZERS = (
    ("nanogpt.optim.normuon_adam.spec:NorMuonAdamSpec", "nanogpt.optim.normuon_adam.optimizer:NorMuonAdam"),
    ("nanogpt.optim.anvil_adam.spec:AnvilAdamSpec", "nanogpt.optim.anvil_adam.optimizer:AnvilAdam"),
    ("nanogpt.optim.adamw.spec:AdamWSpec", "nanogpt.optim.adamw.optimizer:AdamW"),
)

if not TYPE_CHECKING:
    OptimizerSpec = Annotated[union_of(OPTIMIZERS), Field(discriminator="kind")]
