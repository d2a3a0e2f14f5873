"""`nanogpt warm`: compile a recipe's code ahead of its runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nanogpt.cli.validate import OnOption, RecipeArgument, SetOption
from nanogpt.garbage import collect_later
from nanogpt.threads import initialise_driver, wait_briefly

WorldSizesOption = Annotated[
    list[int] | None,
    typer.Option(
        "--world-size",
        metavar="N",
        help="Also for runs on N GPUs. Repeatable.",
        show_default="as many as --on or the recipe says",
    ),
]
CacheOutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Directory of the cache file.",
        show_default="NANOGPT_CACHE, else cache beside the runs",
    ),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Compile everything again, and replace the file.")]


def warm(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    world_sizes: WorldSizesOption = None,
    out: CacheOutOption = None,
    fresh: FreshOption = False,
) -> None:
    """Compile what RECIPE needs, on one GPU of its type and made-up tokens, and keep it for its runs.

    --on is what the runs will use: `nanogpt warm record89 --on 8xh100` needs one H100.

    A run finds the file by all that decides the code: versions, GPU type, this package's source, the recipe. Nothing
    else of a run happens: no directory, no data, no training.
    """
    wait_briefly()
    initialise_driver()
    collect_later()
    from nanogpt.cache.compile_cache import cache_directory
    from nanogpt.cluster.at_hand import at_hand, check_type
    from nanogpt.errors import InputError
    from nanogpt.hardware import shape
    from nanogpt.recipe import load_recipe
    from nanogpt.training.compile_helper import import_ahead

    spec = load_recipe(recipe, overrides or (), on=on, fill=at_hand(os.environ))
    try:
        check_type(spec.hardware, os.environ)
    except InputError as error:
        raise InputError(
            f"{error}. To compile for {spec.hardware.gpu}, ask for --gres=gpu:{spec.hardware.gpu}:1, as slurm/warm.sh"
            " does outside a job"
        ) from None
    alone = [*(overrides or ()), "hardware.gpus_per_node=1", "hardware.nodes=1", "data.epochs=null"]
    on_one = load_recipe(recipe, alone, on=shape(spec.hardware))
    import_ahead(on_one, out or cache_directory(spec.output.directory), fresh=fresh)
    from nanogpt.training.warm import warm_cache

    for line in warm_cache(on_one, world_sizes=world_sizes or [spec.world_size], directory=out, fresh=fresh):
        typer.echo(line)
