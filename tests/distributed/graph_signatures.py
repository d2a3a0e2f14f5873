"""What the compiled functions of a tiny run's warm-up are called with: the kinds by which graphs are kept."""

import json
from pathlib import Path
from typing import Any

from nanogpt.cache.graphs import kind_of_call
from nanogpt.launch.world import join_world
from nanogpt.recipe import load_recipe
from nanogpt.training.trainer import Trainer


def warm_up(recipe: Path, data: Path, out: Path, *world_sizes: int) -> None:
    """Warm up a rank of the recipe; writes OUT.RANK, and OUT.RANK.more after a warm-up for these world sizes too."""
    spec = load_recipe(recipe)
    seen: set[str] = set()

    def spy(name: str, owner: Any, attribute: str) -> None:
        function = getattr(owner, attribute)

        def call(*arguments: Any, **named: Any) -> Any:
            seen.add(json.dumps([name, repr(kind_of_call(arguments, named))]))
            return function(*arguments, **named)

        setattr(owner, attribute, call)

    with join_world(spec) as world, Trainer(spec, world, run=None, data_directory=data) as trainer:
        spy("training loss", trainer.micro_step, "training_loss")
        spy("evaluation loss", trainer, "evaluation_loss")
        spy("Adam", trainer.optimizer, "_adam")
        spy("banks", trainer.optimizer._bank, "function")
        trainer.warm_up()
        Path(f"{out}.{world.rank}").write_text(json.dumps(sorted(seen)))
        for size in world_sizes:
            trainer.optimizer.warm_up(size)
        Path(f"{out}.{world.rank}.more").write_text(json.dumps(sorted(seen)))
