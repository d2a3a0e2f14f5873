"""Runs with a checkpoint and GPT-2's vocabulary, without training: random weights, and rotary tables after YaRN."""

from __future__ import annotations

from pathlib import Path

import torch
from small_specs import randomize
from tiny_runs import tiny_spec

from nanogpt.data.tokenizer import BOS, VOCAB_SIZE
from nanogpt.runs.directory import RunDirectory
from nanogpt.spec import RunSpec
from nanogpt.training.build import build_model
from nanogpt.training.checkpoint import save_checkpoint
from nanogpt.training.schedule import Schedule

KINDS = ("gpt2", "speedrun", "record89", "record92")


def gpt2_tokens_spec(kind: str, *overrides: str) -> RunSpec:
    """The tiny run's spec with GPT-2's vocabulary."""
    vocabulary = (
        f"model.vocab_size={VOCAB_SIZE}",
        "model.padded_vocab_size=50304",
        f"data={{bos: {BOS}, epochs: null}}",
    )
    return tiny_spec(*vocabulary, *overrides, model=kind)


def untrained_run(path: Path, spec: RunSpec) -> Path:
    """A run in the directory `path` that seems to have made all its steps."""
    RunDirectory.create(path.parent, spec).path.rename(path)
    model = build_model(spec, device="cpu")
    randomize(model)
    for old, new in Schedule(spec).window_changes(spec.training.total_steps - 1):
        model.change_windows(old, new)
    state = {"model": model.state_dict(), "optimizer": {"tables": {}}}
    for name, table in model.tables.items():
        table.last_update[::2] = 1  # the others were never touched
        table.values[::2] = torch.randn(table.values[::2].shape, generator=torch.Generator().manual_seed(1))
        state["optimizer"]["tables"][name] = table.state_dict()
    save_checkpoint(path / "checkpoints", spec.training.total_steps, state, keep=1)
    return path
