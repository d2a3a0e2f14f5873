"""`nanogpt leaderboard`: write submissions as a static page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def leaderboard(
    submissions: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of submissions by `nanogpt submission`.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page goes; an earlier one is updated.")],
) -> None:
    """Check every submission in DIR again, and write those that pass as a page, sorted by time, with their reports.

    What fails is listed separately, with the reason.
    """
    from nanogpt.console import say
    from nanogpt.pages.leaderboard import PAGE_NAME, write_leaderboard

    data = write_leaderboard(submissions, out)
    for rejected in data["rejected"]:
        say(f"not listed: {rejected['submission']}: {rejected['reason'].splitlines()[0]}")
    say(f"{len(data['entries'])} listed, {len(data['rejected'])} not")
    typer.echo(str(out / PAGE_NAME))
