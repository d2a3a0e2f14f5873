"""What the compiled functions of a tiny run's warm-up are called with, as torch would key a graph."""

import json
from pathlib import Path
from typing import Any

import torch

from nanogpt.launch.world import join_world
from nanogpt.recipe import load_recipe
from nanogpt.training.trainer import Trainer


def describe(value: Any) -> Any:
    """Of a tensor what a graph depends on; of anything else the value."""
    if isinstance(value, torch.Tensor):
        return [list(value.shape), list(value.stride()), str(value.dtype), value.requires_grad, str(value.device)]
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if hasattr(value, "inputs"):  # a micro-batch
        return [describe(value.inputs), describe(value.targets), describe(value.cu_seqlens), value.max_seqlen]
    if hasattr(value, "long"):  # windows
        return [describe(value.short), describe(value.long)]
    return repr(value)


def warm_up(recipe: Path, data: Path, out: Path, *world_sizes: int) -> None:
    """Warm up a rank of the recipe; writes OUT.RANK, and OUT.RANK.more after a warm-up for these world sizes too."""
    spec = load_recipe(recipe)
    seen: set[str] = set()

    def spy(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            seen.add(json.dumps([name, *map(describe, arguments), {key: describe(x) for key, x in named.items()}]))
            return function(*arguments, **named)

        setattr(owner, name, call)

    with join_world(spec) as world, Trainer(spec, world, run=None, data_directory=data) as trainer:
        for owner, name in (
            (trainer.micro_step, "training_loss"),
            (trainer, "evaluation_loss"),
            (trainer.optimizer, "_adam"),
            (trainer.optimizer, "_bank"),
        ):
            spy(owner, name)
        trainer.warm_up()
        Path(f"{out}.{world.rank}").write_text(json.dumps(sorted(seen)))
        for size in world_sizes:
            trainer.optimizer.warm_up(size)
        Path(f"{out}.{world.rank}.more").write_text(json.dumps(sorted(seen)))
