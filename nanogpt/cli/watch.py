"""`nanogpt watch`: follow a job live in the terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanogpt.cli.status import RunsOption, runs_directories
from nanogpt.files import open_regular

if TYPE_CHECKING:
    from rich.console import Group

    from nanogpt.cluster.jobs import Job

LOG_LINES = 12


def watch(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="123, or 120_3 for a job of an array.")],
    directory: RunsOption = None,
    every: Annotated[
        float, typer.Option("--every", min=0.2, help="Seconds between readings of the run's files.")
    ] = 2.0,
) -> None:
    """Follow a job until it ends: state, step, losses, time left and the end of its log. Ctrl-C leaves it alone.

    The queue is asked only every fifth time. Without a terminal, prints a line whenever something has changed.
    """
    from rich.live import Live

    from nanogpt.cluster.jobs import find_job, log_path, refresh
    from nanogpt.errors import InputError
    from nanogpt.terminal import rich_console

    places = runs_directories(directory)
    job = find_job(job_id, places)
    log = log_path(job_id)
    console = rich_console()
    looks, last = 0, ""
    with Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else _Lines() as live:
        while True:
            if looks % 5 == 0:
                try:
                    job = find_job(job_id, places)
                except InputError:  # it has ended, and Slurm has forgotten it
                    job.state = "ENDED"
                log = log or log_path(job_id)
            else:
                refresh(job)
            if console.is_terminal:
                live.update(view(job, log), refresh=True)
            elif (line := one_line(job)) != last:
                last = line
                typer.echo(line)
            if not job.live:
                return
            looks += 1
            time.sleep(every)


class _Lines:
    """Keeps nothing on the screen."""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, *_: object, **__: object) -> None:
        """Nothing."""


def one_line(job: Job) -> str:
    """`12 running: step 30/120, val loss 8.1034, 1 min 20 s left`."""
    from nanogpt.cluster.jobs import duration

    run = job.run
    parts = [] if run is None else [f"step {run.progress}"]
    if run is not None and run.val_loss is not None:
        parts.append(f"val loss {run.val_loss:.4f}")
    if job.seconds_of_run_left is not None:
        parts.append(f"{duration(job.seconds_of_run_left)} left")
    state = job.state.lower() or (f"run {run.state}" if run else "ended")
    waits = f" ({job.reason})" if job.reason else ""
    return f"{job.id} {state}{waits}" + (": " + ", ".join(parts) if parts else "")


def view(job: Job, log: Path | None) -> Group:
    """The job's row, a bar of its steps, and the end of its log."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    from nanogpt.cluster.jobs import jobs_table
    from nanogpt.terminal import printable

    parts: list[Any] = [jobs_table([job])]
    if job.run is not None and job.run.total_steps:
        parts.append(ProgressBar(total=job.run.total_steps, completed=job.run.steps))
    if log is not None:
        parts += [
            Text(""),
            Text(str(log), style="dim"),
            *(Text(printable(line), no_wrap=True) for line in last_lines(log)),
        ]
    return Group(*parts)


def last_lines(path: Path, count: int = LOG_LINES) -> list[str]:
    """The file's last lines; none if it cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - 200 * count))
            return file.read().decode("utf-8", errors="replace").splitlines()[-count:]
    except OSError:
        return []
