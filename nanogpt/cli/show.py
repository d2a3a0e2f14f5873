"""`nanogpt show` and `nanogpt recipes`: what a recipe resolves to, and which recipes there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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


def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the recipes that come with the package, and what each is."""
    from rich.text import Text

    from nanogpt.console import new_table, print_table
    from nanogpt.recipe import shipped_recipes

    facts = [_facts(path) for path in sorted(shipped_recipes().glob("*.yaml"), key=lambda path: path.stem)]
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = new_table("recipe", "hardware", "steps", "tokens", "what it is", left=2, wrap=["what it is"])
    for fact in facts:
        if not fact["hardware_of"]:
            tokens = f"{fact['tokens'] / 1e6:,.0f} M" if fact["tokens"] > 1e6 else f"{fact['tokens'] / 1e3:,.0f} k"
            table.add_row(fact["recipe"], fact["hardware"] or "any", f"{fact['steps']:,}", tokens, fact["description"])
    sizes: dict[str, list[str]] = {}
    for fact in facts:
        if fact["hardware_of"]:
            sizes.setdefault(fact["hardware_of"], []).append(fact["recipe"])
    notes = [f"{name} on stated hardware: {', '.join(names)}" for name, names in sizes.items()]
    print_table(table, Text("\n".join([*notes, "Any recipe runs on other hardware with --on, such as --on 4xh200."])))


def _facts(path: Path) -> dict[str, Any]:
    """What `nanogpt recipes` shows for the shipped recipe at `path`."""
    from nanogpt.hardware import shape
    from nanogpt.recipe import own_keys, resolve_recipe

    spec, left_open = resolve_recipe(path)
    base, keys = own_keys(path)
    return {
        "recipe": path.stem,
        "description": spec.description,
        "model": spec.model.kind,
        "hardware": None if left_open else shape(spec.hardware),
        "hardware_of": base if base and keys <= {"name", "hardware"} else None,
        "world_size": None if left_open else spec.world_size,
        "steps": spec.training.total_steps,
        "tokens": spec.training.total_tokens,
    }
