"""`nanogpt validate`: check recipes without torch and without a GPU."""

from __future__ import annotations

from typing import Annotated

import typer


def recipe_names(incomplete: str) -> list[str]:
    """For shell completion: the shipped recipes whose names begin like this."""
    from nanogpt.recipe import shipped_recipes

    return sorted(path.stem for path in shipped_recipes().glob("*.yaml") if path.stem.startswith(incomplete))


# What `validate`, `show` and `train` have in common.
RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A file, or the name of a shipped recipe.", autocompletion=recipe_names),
]
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
        show_default="the recipe's, if it names any",
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, metavar="N", help="Shorten the schedule in proportion to N steps; values from --set stay."
    ),
]


def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="Files, or names of shipped recipes.", autocompletion=recipe_names),
    ],
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: LookedAtOnOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines; errors as well.")] = False,
) -> None:
    """Check recipes: a line for each valid one, and every error with file, line and key.

    Exit code 2: a recipe has an error.
    """
    import json

    from nanogpt.errors import InputError
    from nanogpt.recipe import resolve_recipe

    errors: list[str] = []
    found: list[dict[str, object]] = []
    for recipe in recipes:
        try:
            spec, left_open = resolve_recipe(recipe, overrides or (), steps, on=on)
        except InputError as error:
            errors.append(str(error))
            found.append({"recipe": recipe, "valid": False, "errors": str(error).splitlines()})
            continue
        training = spec.training
        found.append({"recipe": recipe, "valid": True, "errors": []})
        if as_json:
            continue
        typer.echo(
            f"{recipe}: valid: {spec.name}, {training.total_steps:,} steps, {training.total_tokens:,} tokens,"
            f" {'hardware open (--on)' if left_open else f'world size {spec.world_size}'}"
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        raise typer.Exit(2 if errors else 0)
    if errors:
        raise InputError("\n".join(dict.fromkeys(errors)))
