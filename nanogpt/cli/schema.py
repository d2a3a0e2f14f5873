"""`nanogpt schema`: print the JSON Schema of recipes."""

from __future__ import annotations

from typing import Annotated

import typer


def schema(
    resolved: Annotated[
        bool, typer.Option("--resolved", help="That of a resolved run spec, where nothing may be missing.")
    ] = False,
) -> None:
    """Print the JSON Schema that recipes name in their first line, so that editors complete and check them."""
    from nanogpt.recipe_schema import schema_text

    typer.echo(schema_text(resolved=resolved), nl=False)
