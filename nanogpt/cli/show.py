"""`nanogpt show` and `nanogpt recipes`: what a recipe resolves to, and which there are."""

from __future__ import annotations

from typing import Annotated

import typer

from nanogpt.cli.validate import RecipeArgument, SetOption, StepsOption


def show(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    steps: StepsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of YAML.")] = False,
) -> None:
    """Print a recipe with everything it inherits, as YAML that is itself a recipe."""
    from nanogpt.recipe import dump_spec, load_recipe

    spec = load_recipe(recipe, overrides or (), steps)
    typer.echo(spec.model_dump_json(indent=2) + "\n" if as_json else dump_spec(spec), nl=False)


def recipes() -> None:
    """List the recipes that come with the package."""
    from nanogpt.recipe import load_recipe, shipped_recipes

    rows = [("recipe", "model", "gpu", "world size", "steps", "tokens")]
    for path in sorted(shipped_recipes().glob("*.yaml"), key=lambda path: path.stem):
        spec = load_recipe(path)
        training, hardware = spec.training, spec.hardware
        steps, tokens = f"{training.total_steps:,}", f"{training.total_tokens:,}"
        rows.append((path.stem, spec.model.kind, hardware.gpu, str(spec.world_size), steps, tokens))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
