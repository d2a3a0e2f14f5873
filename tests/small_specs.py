"""The shipped recipes made small: every mechanism and layer set stays, sizes and vocabulary shrink."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.models.model_spec import BaseModelSpec, Slot
from nanogpt.models.stage_loss import StageLoss
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

BIGRAMS = f"model.bigram_rows={BIGRAM_ROWS}"
SMALL = (
    "model.vocab_size=61",
    f"model.padded_vocab_size={VOCAB}",
    "data.bos=60",
)


def small_speedrun(head_dim: int = 16, overrides: Iterable[str] = ()) -> RunSpec:
    """The speedrun's recipe on one CPU process, with 6 heads of `head_dim`, half of it rotated."""
    return _small("speedrun", head_dim, (BIGRAMS, *overrides))


def small_record89(head_dim: int = 16, overrides: Iterable[str] = ()) -> RunSpec:
    """Record 89's recipe in the same manner, with a window of 5 for the mixing of heads and 13 sign vectors."""
    return _small("record89", head_dim, (BIGRAMS, "model.dc_window=5", "model.bigram_signs=13", *overrides))


def small_record92(head_dim: int = 16, overrides: Iterable[str] = ()) -> RunSpec:
    """Record 92's recipe in the same manner: half of a head in narrow layers, twelve groups of channels."""
    half = head_dim // 2
    sizes = (f"model.narrow_head_dim={half}", f"model.half_value_dim={half}", f"model.group_channels={half}")
    tables = (f"model.ngram_rows={BIGRAM_ROWS - 2}", "model.ngram_signs=16", "model.mlp_width=88")
    whole = [f"training.stages.{stage}.candidates=null" for stage in range(4)]
    return _small("record92", head_dim, (*sizes, *tables, *whole, "training.end=[]", *overrides))


def _small(recipe: str, head_dim: int, overrides: Iterable[str]) -> RunSpec:
    sizes = (f"model.head_dim={head_dim}", f"model.width={6 * head_dim}", f"model.rotary.frequencies={head_dim // 4}")
    machine = ("hardware.gpu=cpu", "hardware.gpus_per_node=1", "runtime.dtype=fp32")
    return load_recipe(recipe, [*SMALL, *sizes, *machine, *overrides])


def batch_of(
    spec: BaseModelSpec, inputs: torch.Tensor, targets: torch.Tensor, *rest: Any, loss: StageLoss | None = None
) -> MicroBatch:
    """A micro-batch of inputs and targets (T,), and what else one is made of, with what the model wants besides."""
    tokens = (x.numpy().astype(np.uint16) for x in (inputs, targets))
    arrays = spec.batch_extras(Slot(*tokens, loss)).arrays
    return MicroBatch(inputs.int(), targets, *rest, {name: torch.from_numpy(values) for name, values in arrays.items()})


def on_gpu(batch: MicroBatch) -> MicroBatch:
    """The same on the GPU."""
    tensors = (x.cuda() for x in (batch.inputs, batch.targets, batch.cu_seqlens))
    return MicroBatch(*tensors, batch.max_seqlen, {name: extra.cuda() for name, extra in batch.extras.items()})


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random values of a size that makes every parameter count; nothing stays 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = SPREADS.get(name, 0.8)
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if name in CENTERED:
            parameter.add_(0.7)


def add_gradients_alike(model: nn.Module, other: nn.Module, generator: torch.Generator) -> None:
    """Add the same random gradients to two models' parameters, in place where there are some already."""
    for parameters in zip(model.parameters(), other.parameters(), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator, device=generator.device)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient.to(parameter.dtype))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; absolute where that is zero."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp(min=1e-30)) if difference else 0.0
