"""`nanogpt cancel`: end a job, and see it end."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from nanogpt.cli.status import RunsOption, runs_directories

PATIENCE_S = 90.0


def cancel(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="123, or 120_3 for a job of an array.")],
    directory: RunsOption = None,
) -> None:
    """Cancel one of my jobs, wait until nothing of it runs, and show what its run has left."""
    from nanogpt.cluster.jobs import find_job, my_jobs, refresh
    from nanogpt.cluster.outside import ask_or_fail
    from nanogpt.console import say
    from nanogpt.errors import InputError, RunError

    places = runs_directories(directory)
    job = find_job(job_id, places)
    if not job.live:
        raise InputError(f"{job_id}: has ended already")
    ask_or_fail("scancel", job_id)
    began = time.monotonic()
    while any(one.live for one in my_jobs(places, only=job_id).jobs):
        if time.monotonic() - began > PATIENCE_S:
            raise RunError(f"{job_id}: still in the queue {PATIENCE_S:.0f} s after scancel; see: squeue --job {job_id}")
        time.sleep(1)
    typer.echo(f"{job_id}: cancelled, ended after {time.monotonic() - began:.0f} s")
    refresh(job)
    if job.run is not None:
        say(f"{job.run.path}: {job.run.state} after step {job.run.progress}")
        if any((job.run.path / "checkpoints").glob("step-*.pt")):
            say(f"It can continue: slurm/run.sh --resume {job.run.path}")
