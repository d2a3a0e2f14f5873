"""`nanogpt validate`: check recipes without torch and without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

# What `validate`, `show` and `train` have in common.
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value, for example --set training.stages.0.batch_tokens=65536. May be repeated.",
    ),
]
OnOption = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="[NODESx]GPUSxTYPE",
        help="Hardware to run on, such as 4xh200, or 2x4xh100 for two nodes of four.",
        show_default="the recipe's, else the GPUs at hand",
    ),
]
LookedAtOnOption = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="[NODESx]GPUSxTYPE",
        help="For this hardware, such as 4xh200, or 2x4xh100 for two nodes of four.",
        show_default="the recipe's, if it says one",
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option("--steps", min=1, metavar="N", help="Shorten the schedule in proportion to this many steps."),
]


def validate(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE", help="Files, or names of shipped recipes.", show_default=False)
    ],
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: LookedAtOnOption = None,
) -> None:
    """Check recipes: one line for each that is valid; every error with file, line and key; exit code 2 for any."""
    from nanogpt.errors import InputError
    from nanogpt.recipe import resolve_recipe

    errors = []
    for recipe in recipes:
        try:
            spec, left_open = resolve_recipe(recipe, overrides or (), steps, on=on)
        except InputError as error:
            errors.append(str(error))
            continue
        training = spec.training
        typer.echo(
            f"{recipe}: valid: {spec.name}, {training.total_steps:,} steps, {training.total_tokens:,} tokens,"
            f" {'hardware open (--on)' if left_open else f'world size {spec.world_size}'}"
        )
    if errors:
        raise InputError("\n".join(dict.fromkeys(errors)))
