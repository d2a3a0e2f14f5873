"""`nanogpt check`: check a run against the public rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Check RUN against the public rules; each is passed, failed or unknown, with the evidence.

    Exit code 1: a rule fails.
    """
    import json

    from nanogpt.console import print_table
    from nanogpt.runs.check import check_data, check_run, check_table, failed
    from nanogpt.runs.loaded import load_runs

    (loaded,) = load_runs([run])
    checks = check_run(loaded)
    if as_json:
        typer.echo(json.dumps(check_data(loaded, checks), indent=2))
    else:
        print_table(check_table(checks))
    raise typer.Exit(1 if failed(checks) else 0)
