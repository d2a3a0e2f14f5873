"""My jobs, from squeue and, if configured, sacct, each with what its run reports."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.cluster.outside import NOT_FOUND, ask
from nanogpt.errors import InputError, RunError
from nanogpt.runs.display import ms_text
from nanogpt.runs.listing import RunRow, list_runs, run_row
from nanogpt.runs.metrics import read_run
from nanogpt.terminal import printable

if TYPE_CHECKING:
    from rich.table import Table

# The name comes last, as it may contain anything.
SQUEUE_FIELDS = ("%i", "%A", "%T", "%M", "%L", "%P", "%D", "%r", "%N", "%Z", "%j")
SACCT_FIELDS = ("JobID", "JobIDRaw", "State", "Elapsed", "Partition", "NNodes", "NodeList", "ExitCode", "JobName")
ENDED_SINCE = "now-2days"
LIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SIGNALING",
    "STAGE_OUT",
)


@dataclass
class Job:
    """One job. Times as Slurm writes them, `1-02:03:04`; empty: unknown."""

    id: str  # 123, or 120_3 of an array
    raw_id: str
    state: str  # PENDING, RUNNING, COMPLETED, ...
    elapsed: str
    left: str
    partition: str
    nodes: int
    reason: str  # why it is waiting, or its exit code
    node_list: str
    directory: Path | None  # where it was submitted
    name: str
    run: RunRow | None = None
    train_loss: float | None = None

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in LIVE

    @property
    def seconds_of_run_left(self) -> float | None:
        """For the run's remaining steps, at its mean speed so far; None: unknown."""
        run = self.run
        if run is None or not run.ms_per_step or run.total_steps is None or self.state != "RUNNING":
            return None
        return max(0, run.total_steps - run.steps) * run.ms_per_step / 1000


@dataclass
class Jobs:
    """What is known about my jobs."""

    jobs: list[Job]
    history: bool  # whether sacct answered


def parse_squeue(text: str) -> list[Job]:
    """Jobs of `squeue --noheader --format=SQUEUE_FIELDS`, joined by |."""
    jobs = []
    for line in text.splitlines():
        parts = line.split("|", len(SQUEUE_FIELDS) - 1)
        if len(parts) == len(SQUEUE_FIELDS):
            job, raw, state, elapsed, left, partition, nodes, reason, node_list, directory, name = parts
            reason = "" if reason in ("None", "(null)") else reason
            count = int(nodes) if nodes.isdecimal() else 0
            jobs.append(Job(job, raw, state, elapsed, left, partition, count, reason, node_list, Path(directory), name))
    return jobs


def parse_sacct(text: str) -> list[Job]:
    """Jobs of `sacct --noheader --parsable2 --allocations --format=SACCT_FIELDS`."""
    jobs = []
    for line in text.splitlines():
        parts = line.split("|", len(SACCT_FIELDS) - 1)
        if len(parts) == len(SACCT_FIELDS):
            job, raw, state, elapsed, partition, nodes, node_list, code, name = parts
            word = state.split()[0] if state else ""  # "CANCELLED by 1000"
            reason = "" if code in ("0:0", "") else f"exit code {code.partition(':')[0]}"
            count = int(nodes) if nodes.isdecimal() else 0
            jobs.append(Job(job, raw, word, elapsed, "", partition, count, reason, node_list, None, name))
    return jobs


def my_jobs(runs_directories: Sequence[Path], *, only: str | None = None) -> Jobs:
    """My jobs with their runs, newest last. Runs are sought in `runs_directories` and where jobs were submitted.

    Args:
        runs_directories: where runs are; missing ones are skipped.
        only: a job's id.

    Raises:
        RunError: squeue is missing or does not answer.
    """
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
    # All states, which includes jobs that ended some minutes ago.
    answer = ask("squeue", "--noheader", "--states=all", f"--user={user}", f"--format={'|'.join(SQUEUE_FIELDS)}")
    if answer.code == NOT_FOUND:
        raise RunError("squeue: not found. On a cluster use slurm/nanogpt.sh; elsewhere: nanogpt runs")
    if answer.code:
        raise RunError(f"squeue: {answer.err.strip()}")
    jobs = parse_squeue(answer.out)
    history = ask(
        "sacct", "--noheader", "--parsable2", "--allocations", f"--user={user}", f"--starttime={ENDED_SINCE}",
        f"--format={','.join(SACCT_FIELDS)}",
    )  # fmt: skip
    if history.code == 0:
        known = {job.raw_id for job in jobs}
        jobs = [job for job in parse_sacct(history.out) if job.raw_id not in known] + jobs
    places = list(runs_directories) + [job.directory / "runs" for job in jobs if job.directory is not None]
    _join(jobs, _rows(places))
    if history.code != 0:
        jobs = _ended(jobs, _rows(places)) + jobs
    if only is not None:
        jobs = [job for job in jobs if only in (job.id, job.raw_id)]
    return Jobs(sorted(jobs, key=_by_number), history.code == 0)


def _by_number(job: Job) -> tuple[int, ...]:
    """By the job or its array, then by task; tasks waiting together, `120_[4-9]`, by the first."""
    numbers = [int(number) for number in re.findall(r"\d+", job.id)]
    return tuple(numbers[:2])


def _rows(directories: Iterable[Path]) -> list[RunRow]:
    rows: dict[Path, RunRow] = {}
    for directory in dict.fromkeys(path.resolve() for path in directories):
        try:
            rows |= {row.path.resolve(): row for row in list_runs(directory)}
        except InputError:  # no such directory
            continue
    return list(rows.values())


def _join(jobs: Sequence[Job], rows: Sequence[RunRow]) -> None:
    for row in rows:  # oldest first, so the newest run of a job wins
        for job in jobs:
            if row.job == job.id:
                job.run, job.train_loss = row, last_train_loss(row.path)


def _ended(jobs: Sequence[Job], rows: Sequence[RunRow]) -> list[Job]:
    """Jobs that squeue no longer knows, from their runs, if sacct is missing."""
    known = {job.id for job in jobs}
    since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    ended: dict[str, Job] = {}
    for row in rows:
        if row.job and row.job not in known and row.created is not None and row.created > since:
            job = Job(row.job, row.job, "", "", "", "", 0, "", row.hosts or "", None, row.name, row)
            job.train_loss = last_train_loss(row.path)
            ended[row.job] = job
    return list(ended.values())


def last_train_loss(path: Path) -> float | None:
    """The newest training loss of the run at `path`; None if there is none."""
    try:
        steps = read_run(path).steps
    except InputError:
        return None
    return next((step["train_loss"] for step in reversed(steps) if step.get("train_loss") is not None), None)


def refresh(job: Job) -> None:
    """Read the job's run again."""
    if job.run is not None:
        job.run, job.train_loss = run_row(job.run.path), last_train_loss(job.run.path)


def jobs_table(jobs: Sequence[Job]) -> Table:
    """The jobs as a table; a narrow terminal drops nodes, training loss and speed."""
    from rich.text import Text

    from nanogpt.console import new_table

    columns = ("job", "state", "step", "val loss", "run left", "limit left", "run", "train loss", "ms/step", "where")
    table = new_table(*columns, wrap=("state", "run", "where"), spare=("where", "train loss", "ms/step"))
    for job in jobs:
        run = job.run
        state = job.state.lower() or (f"run {run.state}" if run else "")
        left = job.seconds_of_run_left
        table.add_row(
            job.id,
            state + (f" ({job.reason})" if job.reason else ""),
            "" if run is None else run.progress,
            "" if run is None or run.val_loss is None else f"{run.val_loss:.4f}",
            "" if left is None else duration(left),
            job.left if job.live else "",
            Text(printable(run.name if run else job.name)),
            "" if job.train_loss is None else f"{job.train_loss:.4f}",
            "" if run is None or run.ms_per_step is None else ms_text(run.ms_per_step),
            Text(printable(job.node_list or job.partition)),
        )
    return table


def duration(seconds: float) -> str:
    """`3 min 20 s`, `42 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def log_path(job: str) -> Path | None:
    """The job's log according to Slurm; None if Slurm no longer says."""
    match = re.search(r"^ *StdOut=(.+)$", ask("scontrol", "show", "job", job).out, re.MULTILINE)
    return Path(match.group(1)) if match else None


def find_job(job: str, runs_directories: Sequence[Path]) -> Job:
    """My job `job`. Raises `InputError`, which lists my jobs."""
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise InputError(f"{job}: not a job id; expected one such as 123, or 120_3 for a task of an array")
    everything = my_jobs(runs_directories)
    for one in everything.jobs:
        if job in (one.id, one.raw_id):
            return one
    known = ", ".join(one.id for one in everything.jobs[-10:]) or "none"
    raise InputError(f"{job}: you have no such job in the queue, nor a run of it; your jobs: {known}")
