"""Ranks that compile a run's graphs, with the compiling itself left out."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

from nanogpt.cache.compile_cache import CompileCache
from nanogpt.launch.world import join_world
from nanogpt.recipe import load_recipe
from nanogpt.training import parallel_compile


def compile_graphs(recipe: Path, root: Path, out: Path) -> None:
    """Writes OUT.RANK: the names of what this rank compiles, in order."""
    spec, compiled = load_recipe(recipe), list[str]()

    def call(job: parallel_compile.GraphJob, *_: Any) -> None:
        compiled.append(job.name)

    with join_world(spec) as world, mock.patch.object(parallel_compile, "call_graph", call):
        cache = CompileCache(world, root)
        cache.root = root
        arguments: Any = {"micro_step": None, "evaluation_loss": None, "given_up": lambda: False}
        parallel_compile.compile_in_parallel(
            spec, world, cache, warm_up_optimizer=lambda: compiled.append("the optimizer's"), **arguments
        )
        Path(f"{out}.{world.rank}").write_text(json.dumps(compiled))
