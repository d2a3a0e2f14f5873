"""`nanogpt submission`: make a record ready to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def submission(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs of one recipe.")],
    description: Annotated[str, typer.Option("--description", metavar="TEXT", help="What is new, in a few words.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to make.")],
    contributors: Annotated[
        str | None, typer.Option("--contributors", metavar="A,B", help="Names, separated by commas.")
    ] = None,
    log_url: Annotated[str | None, typer.Option("--log-url", metavar="URL", help="Where the log is published.")] = None,
    unofficial: Annotated[
        bool, typer.Option("--unofficial", help="Continue if a rule or the test fails, and mark it everywhere.")
    ] = False,
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="modded-nanogpt",
            help="Also records/track_1_short/DATE_Name, as in that repository.",
        ),
    ] = None,
) -> None:
    """Make the directory --out from RUNs: the leaderboard's row as Markdown and JSON, logs, records, plots and notes.

    Runs that fail `nanogpt check` or `nanogpt significance` are refused. The row is printed.
    """
    from nanogpt.console import say
    from nanogpt.errors import InputError
    from nanogpt.runs.loaded import load_runs
    from nanogpt.runs.public_layout import FORMAT, write_public
    from nanogpt.runs.submission import Fields, caveats, markdown_row, prepare, write_submission

    if layout not in (None, FORMAT):
        raise InputError(f"--format: found {layout!r}, expected {FORMAT}")
    names = tuple(name for name in map(str.strip, (contributors or "").split(",")) if name)
    fields = Fields(description, names, log_url)
    made = prepare(load_runs(runs, need_records=True), fields, unofficial=unofficial)
    write_submission(made, out, write_public if layout else None)
    for caveat in caveats(made):
        say(f"Caveat: {caveat}")
    say(f"Submission: {out}")
    typer.echo(markdown_row(made))
