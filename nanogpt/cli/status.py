"""`nanogpt status`: show my jobs and their runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nanogpt.environment import path_of

RunsOption = Annotated[
    Path | None,
    typer.Option(
        "--runs",
        metavar="DIR",
        help="Where runs are; the directories that jobs were submitted from are searched too.",
        show_default="NANOGPT_RUNS, else ./runs",
    ),
]


def runs_directories(directory: Path | None) -> list[Path]:
    """Where to look for runs."""
    return [directory or path_of("NANOGPT_RUNS") or Path("runs")]


def status(
    directory: RunsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """My jobs of the last two days: state, step, loss, ms/step, time left of the run and of the job.

    From squeue and sacct; if sacct is not configured, ended jobs are known from their runs.
    """
    from nanogpt.cluster.jobs import jobs_table, my_jobs
    from nanogpt.console import print_table, say

    found = my_jobs(runs_directories(directory))
    if as_json:
        rows = []
        for job in found.jobs:
            row = {key: value for key, value in asdict(job).items() if key != "run"}
            row["directory"] = None if job.directory is None else str(job.directory)
            row["run"] = None if job.run is None else job.run.as_json()
            rows.append(row)
        typer.echo(json.dumps(rows, indent=1))
        return
    if not found.jobs:
        say("no jobs")
        return
    print_table(jobs_table(found.jobs))
    if not found.history:
        say("sacct is not configured here: ended jobs are listed from their runs")
