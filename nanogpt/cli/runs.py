"""`nanogpt runs`: list runs in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def runs(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR", help="Directory with runs in it or below.", show_default="NANOGPT_RUNS, else ./runs"
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option("--sort", metavar="KEY", help="Column to sort by, -KEY for the largest first: val_loss, ..."),
    ] = "created",
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", metavar="KEY=VALUE", help="Only matching runs: state=finished, 'val_loss<3.28'. Repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, with more columns, instead of a table.")] = False,
) -> None:
    """List runs: state, steps, validation loss, time, GPUs, commit; also those that were killed or have no record."""
    import json

    from nanogpt.console import print_table, say
    from nanogpt.environment import path_of
    from nanogpt.runs.listing import filter_runs, list_runs, runs_table, sort_runs

    directory = directory or path_of("NANOGPT_RUNS") or Path("runs")
    rows = sort_runs(filter_runs(list_runs(directory), filters or ()), sort)
    if as_json:
        typer.echo(json.dumps([row.as_json() for row in rows], indent=1))
        return
    if not rows:
        say(f"{directory}: no runs" + (" that match the filters" if filters else ""))
        return
    print_table(runs_table(rows))
    for row in rows:
        for text in (row.reason, row.problem):
            if text:
                say(f"{row.name}: {text}")
