"""Runs as on an L40S, on a larger GPU: kernels and precisions chosen as there, memory limited to 44 GB.

Attention is `varlen`, the head runs in FP8 or bf16, the MLP in bf16, and nothing is captured. Code is compiled for the
GPU at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanogpt.data.made_up import write_made_up_shards
from nanogpt.kernels import dispatch
from nanogpt.recipe import load_recipe
from nanogpt.training import implementations
from nanogpt.training.trainer import train_run

pytestmark = [pytest.mark.gpu, pytest.mark.long, pytest.mark.timeout(1800)]

L40S, MEMORY = (8, 9), 44_000_000_000


@pytest.fixture
def l40s(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This GPU treated as one of sm_89 with 44 GB to spare."""
    total = torch.cuda.get_device_properties(0).total_memory
    if total < MEMORY or torch.cuda.get_device_capability() < L40S:
        pytest.skip("needs a GPU of sm_89 or newer with 44 GB")
    for module in (dispatch, implementations):
        monkeypatch.setattr(module, "device_capability", lambda device: L40S)
    monkeypatch.setattr(implementations, "GRAPHS_MEMORY", total + 1)
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(MEMORY / total)
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.compiler.reset()


@pytest.mark.usefixtures("l40s")
@pytest.mark.parametrize("head", ["fp8", "bf16"])
@pytest.mark.parametrize("recipe", ["speedrun", "record89"])
def test_every_stage_fits_an_l40s(recipe: str, head: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = [
        f"runtime.head_precision={head}",
        "evaluation.tokens=2097152",
        "evaluation.every=null",
        "evaluation.target_loss=null",
        "data.epochs=null",
        "checkpoint.at_end=false",
    ]
    spec = load_recipe(recipe, overrides, steps=16, on="1xl40s")
    device = torch.device("cuda", 0)
    chosen, lines = implementations.choose_implementations(spec, device)
    assert (chosen.attention, chosen.head_precision, chosen.mlp_precision) == ("varlen", head, "bf16"), lines
    assert not implementations.captures_graphs(spec, device)
    write_made_up_shards(tmp_path, train_tokens=12_000_000, val_tokens=2_097_153, bos=spec.data.bos)
    result = train_run(spec, run=None, data_directory=tmp_path)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with capfd.disabled():
        print(f"\n{recipe}, {head} head: {allocated / 1e9:.1f} GB allocated, {reserved / 1e9:.1f} GB reserved", end=" ")
    assert math.isfinite(result.final_val_loss)
    assert reserved <= MEMORY
