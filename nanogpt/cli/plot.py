"""`nanogpt plot`: draw the losses of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are drawn together.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The picture, .png or .svg.",
            show_default="loss.png in the run's directory; for several runs, in this one",
        ),
    ] = None,
) -> None:
    """Draw validation and training loss of runs, finished or not, against steps and against training time.

    Exit code 1: a run cannot be read; the others are drawn.
    """
    from nanogpt.runs.loaded import load_readable_runs, plot_runs, say_unreadable

    loaded, unreadable = load_readable_runs(runs)
    say_unreadable(unreadable)
    if out is None:
        out = (loaded[0].path if len(loaded) == 1 else Path()) / "loss.png"
    plot_runs(loaded, out)
    typer.echo(str(out))
    raise typer.Exit(1 if unreadable else 0)
