"""`nanogpt significance`: test whether the mean validation loss of several runs is below the target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def significance(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs of one recipe.")],
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            metavar="LOSS",
            help="The loss that the mean must be below.",
            show_default="the recipe's target, else 3.28",
        ),
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", metavar="P", help="The p-value must be below this.")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Test that the mean validation loss of RUNs is below the target (one-sided t-test).

    The runs must agree in spec (except seed, name, output and data directory), code and hardware. Exit code 1: not
    significant, or a run could not be read and was left out.
    """
    import json

    from nanogpt.console import print_table, say
    from nanogpt.runs.loaded import load_readable_runs, say_unreadable
    from nanogpt.runs.significance import repeated_seeds, runs_significance, significance_data, significance_table

    loaded, unreadable = load_readable_runs(runs, need_records=True)
    say_unreadable(unreadable)
    result = runs_significance(loaded, target=target, alpha=alpha)
    if as_json:
        typer.echo(json.dumps(significance_data(result, loaded), indent=2))
    else:
        print_table(significance_table(result, loaded))
        seeds = repeated_seeds(loaded)
        if seeds:
            say(
                f"Note: several runs have seed {', '.join(map(str, seeds))}: they differ only by rounding, which"
                " understates the spread. Give each run its own: --set training.seed=N"
            )
    raise typer.Exit(0 if result.significant and not unreadable else 1)
