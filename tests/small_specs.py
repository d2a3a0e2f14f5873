"""The shipped recipes made small: every mechanism and layer set stays, sizes and vocabulary shrink."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from nanogpt.recipe import load_recipe
from nanogpt.spec import RunSpec

VOCAB, BIGRAM_ROWS = 64, 98  # padded vocabulary; the hash is taken modulo 97

SMALL = (
    "model.vocab_size=61",
    f"model.padded_vocab_size={VOCAB}",
    f"model.bigram_rows={BIGRAM_ROWS}",
)


def small_speedrun(head_dim: int = 16, overrides: Iterable[str] = ()) -> RunSpec:
    """The speedrun's recipe on one CPU process, with 6 heads of `head_dim`, half of it rotated."""
    sizes = (f"model.head_dim={head_dim}", f"model.width={6 * head_dim}", f"model.rotary.frequencies={head_dim // 4}")
    machine = ("hardware.gpu=cpu", "hardware.gpus_per_node=1", "runtime.dtype=fp32")
    return load_recipe("speedrun", [*SMALL, *sizes, *machine, *overrides])


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random values of a size that makes every parameter count; nothing stays 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = {"attn": 0.15, "mlp": 0.15, "lm_head": 0.7, "x0_lambdas": 0.5, "scalars": 0.3}.get(name, 0.8)
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if name == "scalars":
            parameter.add_(0.7)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; absolute where that is zero."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp(min=1e-30)) if difference else 0.0
