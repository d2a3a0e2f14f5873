"""`nanogpt report`: write runs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, finished or not.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page, such as report.html.")],
) -> None:
    """Write a page about RUNs that opens anywhere, without a network: result, curves, stages, rules, provenance.

    Exit code 1: a run cannot be read; the page says so and shows the others.
    """
    from nanogpt.errors import InputError
    from nanogpt.pages.report import write_report
    from nanogpt.runs.loaded import load_readable_runs, say_unreadable

    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out: found {str(out)!r}, expected the name of a page, such as report.html")
    loaded, unreadable = load_readable_runs(runs)
    say_unreadable(unreadable)
    write_report(loaded, out, left_out=[str(error) for error in unreadable])
    typer.echo(str(out))
    raise typer.Exit(1 if unreadable else 0)
