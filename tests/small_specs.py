"""The shipped recipes made small: every mechanism and layer set stays, sizes and vocabulary shrink."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from nanogpt.data.batches import MicroBatch
from nanogpt.models.model_spec import BaseModelSpec, Slot
from nanogpt.recipe import load_recipe
from nanogpt.spec import RunSpec

VOCAB, BIGRAM_ROWS = 64, 98  # padded vocabulary; the hash is taken modulo 97

SPREADS = {
    **dict.fromkeys(("attn", "qk", "vo", "mlp"), 0.15),
    "lm_head": 0.7,
    "x0_lambdas": 0.5,
    **dict.fromkeys(("scalars", "resid_lambdas", "post_lambdas"), 0.3),
    **dict.fromkeys(("mudd_w1", "mudd_gate_w1"), 0.03),
}
CENTERED = ("scalars", "resid_lambdas", "post_lambdas", "mudd_gate_scale")  # around 0.7

SMALL = (
    "model.vocab_size=61",
    f"model.padded_vocab_size={VOCAB}",
    f"model.bigram_rows={BIGRAM_ROWS}",
    "data.bos=60",
)


def small_speedrun(head_dim: int = 16, overrides: Iterable[str] = ()) -> RunSpec:
    """The speedrun's recipe on one CPU process, with 6 heads of `head_dim`, half of it rotated."""
    return _small("speedrun", head_dim, overrides)


def small_record89(head_dim: int = 16, overrides: Iterable[str] = ()) -> RunSpec:
    """Record 89's recipe in the same manner, with a window of 5 for the mixing of heads and 13 sign vectors."""
    return _small("record89", head_dim, ("model.dc_window=5", "model.bigram_signs=13", *overrides))


def _small(recipe: str, head_dim: int, overrides: Iterable[str]) -> RunSpec:
    sizes = (f"model.head_dim={head_dim}", f"model.width={6 * head_dim}", f"model.rotary.frequencies={head_dim // 4}")
    machine = ("hardware.gpu=cpu", "hardware.gpus_per_node=1", "runtime.dtype=fp32")
    return load_recipe(recipe, [*SMALL, *sizes, *machine, *overrides])


def batch_of(spec: BaseModelSpec, inputs: torch.Tensor, targets: torch.Tensor, *rest: Any) -> MicroBatch:
    """A micro-batch of inputs and targets (T,), and what else one is made of, with what the model wants besides."""
    arrays = spec.batch_extras(Slot(*(tokens.numpy().astype(np.uint16) for tokens in (inputs, targets)))).arrays
    return MicroBatch(inputs.int(), targets, *rest, {name: torch.from_numpy(values) for name, values in arrays.items()})


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random values of a size that makes every parameter count; nothing stays 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = SPREADS.get(name, 0.8)
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if name in CENTERED:
            parameter.add_(0.7)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; absolute where that is zero."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp(min=1e-30)) if difference else 0.0
