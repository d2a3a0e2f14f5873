"""Fills the compile cache ahead of runs: a warm-up on one process, for runs of any world size."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from nanogpt.cache.compile_cache import VARIABLE, cache_directory
from nanogpt.data.made_up import write_shards_for
from nanogpt.errors import InputError
from nanogpt.launch.world import join_world
from nanogpt.spec import WORLD_SIZES, RunSpec
from nanogpt.training.ahead import compiler
from nanogpt.training.compilation import compiled_functions, functions_table
from nanogpt.training.implementations import compiles
from nanogpt.training.startup import StartUp, phases_table
from nanogpt.training.trainer import Trainer


def warm_cache(spec: RunSpec, *, world_sizes: Sequence[int], directory: Path | None, fresh: bool) -> list[str]:
    """Compile everything that runs of `spec` compile, and leave it in the cache file.

    Args:
        spec: the recipe on one process, with endless data.
        world_sizes: of the runs to come. The optimizer's part depends on them, model and loss do not.
        directory: of the file; None: NANOGPT_CACHE, else beside the runs.
        fresh: replace an existing file instead of completing it.

    Returns lines to print: the cache's, start-up by phase, compilation by function. Raises `InputError` for a
    recipe that is not compiled, invalid world sizes, and NANOGPT_CACHE=off.
    """
    startup = StartUp()
    for size in world_sizes:
        if size not in WORLD_SIZES or spec.training.slots % size:
            raise InputError(
                f"--world-size: {size} does not fit; it can be {', '.join(map(str, WORLD_SIZES))}, and must divide"
                f" training.slots = {spec.training.slots}"
            )
    place = directory or cache_directory(spec.output.directory)
    if place is None:
        raise InputError(f"{VARIABLE}: is off; name the directory of the cache file with --out")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with startup.phase("device and process group"):
            world = stack.enter_context(join_world(spec))
        if not compiles(spec, world.device):
            raise InputError(f"{spec.name}: runtime.compile is {spec.runtime.compile}: nothing is compiled here")
        with startup.phase("made-up tokens"):
            write_shards_for(spec, scratch)
        cache = stack.enter_context(compiler(spec, world, startup, place, fresh=fresh))
        trainer = stack.enter_context(
            Trainer(spec, world, run=None, data_directory=scratch, cache=cache, startup=startup)
        )
        trainer.warm_up()
        for size in world_sizes:
            if size > 1:
                with startup.phase(f"optimizer for {size} ranks"):
                    trainer.optimizer.warm_up(size)
                    world.synchronize()
        with startup.phase("compile cache, writing"):
            cache.save()
        functions = functions_table(compiled_functions())
        phases = phases_table(startup.phases())
        tables = [line for table in (phases, trainer.compiling_lines, functions) if table for line in ("", *table)]
        return [*trainer.implementation_lines, *cache.lines, *tables]
