"""`nanogpt compare`: show runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Directories of two or more runs.")],
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", metavar="FILE", help="Also draw the losses, as .png or .svg. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Show time, loss and ms/step of RUNs side by side, and how they differ: spec, code, hardware, data.

    Exit code 1: a run cannot be read; the others are shown.
    """
    import json

    from nanogpt.console import print_table, say
    from nanogpt.runs.compare import comparison_data, comparison_table
    from nanogpt.runs.loaded import load_readable_runs, plot_runs, say_unreadable

    loaded, unreadable = load_readable_runs(runs)
    say_unreadable(unreadable)
    data = comparison_data(loaded)
    for path in out or ():
        plot_runs(loaded, path)
        say(f"Plot: {path}")
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        print_table(comparison_table(data))
    raise typer.Exit(1 if unreadable else 0)
