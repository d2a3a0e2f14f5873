"""`nanogpt show` and `nanogpt recipes`: what a recipe resolves to, and which there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nanogpt.cli.validate import LookedAtOnOption, RecipeArgument, SetOption, StepsOption


def show(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: LookedAtOnOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of YAML.")] = False,
) -> None:
    """Print a recipe with everything it inherits, as YAML that is itself a recipe.

    Hardware that the recipe leaves open is left out.
    """
    from nanogpt.recipe import dump_spec, resolve_recipe
    from nanogpt.spec import HardwareSpec
    from nanogpt.terminal import speaks_unicode

    spec, left_open = resolve_recipe(recipe, overrides or (), steps, on=on)
    hidden = {"hardware": left_open if left_open < set(HardwareSpec.model_fields) else True} if left_open else None
    if as_json:
        typer.echo(json.dumps(spec.model_dump(mode="json", exclude=hidden), indent=2))
    else:
        typer.echo(dump_spec(spec, hidden, ascii_only=not speaks_unicode()), nl=False)


def recipes() -> None:
    """List the recipes that come with the package."""
    from nanogpt.recipe import resolve_recipe, shipped_recipes

    rows = [("recipe", "model", "gpu", "world size", "steps", "tokens")]
    for path in sorted(shipped_recipes().glob("*.yaml"), key=lambda path: path.stem):
        spec, left_open = resolve_recipe(path)
        training, hardware = spec.training, spec.hardware
        steps, tokens = f"{training.total_steps:,}", f"{training.total_tokens:,}"
        machine = ("any", "any") if left_open else (hardware.gpu, str(spec.world_size))
        rows.append((path.stem, spec.model.kind, *machine, steps, tokens))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
