"""The runs of a Slurm job: which one a requeued job continues, and whether another requeue would help.

A requeued job keeps its id, so its runs are those whose record names that id and cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanogpt.environment import number_of, value_of
from nanogpt.errors import InputError
from nanogpt.runs.directory import CHECKPOINTS_NAME, is_run
from nanogpt.runs.record import Record, read_record

RESTARTS = 3  # after lost nodes, for a run that makes no progress


@dataclass(frozen=True)
class JobRun:
    """A run that a job made."""

    path: Path
    record: Record

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return any((self.path / CHECKPOINTS_NAME).glob("step-*.pt"))


def runs_of_job(parent: Path, job_id: str, cluster: str | None) -> list[JobRun]:
    """The job's runs in the directory `parent`, oldest first; `cluster` None fits any."""
    found = []
    for path in parent.iterdir() if parent.is_dir() else ():
        if path.name.startswith(".") or not is_run(path):
            continue
        try:
            record = read_record(path)
        except InputError:  # missing or damaged: its job is unknown
            continue
        slurm = record.slurm
        if slurm is not None and slurm.job_id == job_id and cluster in (None, slurm.cluster):
            found.append(JobRun(path, record))
    return sorted(found, key=lambda run: run.record.created)


@dataclass(frozen=True)
class Continuation:
    """What a job should do: start a run, continue `run`, or nothing, if `run` is finished."""

    action: Literal["start", "resume", "nothing"]
    run: JobRun | None = None
    reason: str = ""


def continuation(parent: Path, environ: Mapping[str, str]) -> Continuation:
    """What the job that `environ` describes should do. Only a requeued job has a run to continue."""
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    if not re.fullmatch("0*[1-9][0-9]*", restarts):
        return Continuation("start")
    runs = runs_of_job(parent, value_of("SLURM_JOB_ID", environ), environ.get("SLURM_CLUSTER_NAME"))
    for run in reversed(runs):
        if run.record.state == "finished":
            return Continuation("nothing", run, f"job was requeued after its run {run.path} had finished")
        if run.has_checkpoint:
            return Continuation("resume", run, f"restart {restarts} of the job: continuing with {run.path}")
    if runs:
        return Continuation("start", None, f"restart {restarts} of the job: {runs[-1].path} has no checkpoint")
    return Continuation("start", None, f"restart {restarts} of the job: it has no run in {parent} yet")


def newest_run(parent: Path, environ: Mapping[str, str]) -> JobRun | None:
    """The last run in `parent` made by the job that `environ` describes."""
    runs = runs_of_job(parent, value_of("SLURM_JOB_ID", environ), environ.get("SLURM_CLUSTER_NAME"))
    return runs[-1] if runs else None


def requeue_refusal(run: JobRun, environ: Mapping[str, str], *, lost: bool = False) -> str | None:
    """Why the job, whose run was interrupted, should not start again; None: it should.

    A run that made no progress since its last start would make none next time: the time limit is too short for a start.
    After a `lost` node it may restart RESTARTS times, from the beginning if there is no checkpoint.
    """
    start = run.record.starts[-1]
    if lost:
        steps = [int(path.stem.rpartition("-")[2]) for path in run.path.glob(f"{CHECKPOINTS_NAME}/step-*.pt")]
        restarts = number_of("SLURM_RESTART_COUNT", 0, environ=environ)
        if max(steps, default=0) > (start.resumed_at or 0) or restarts < RESTARTS:
            return None
        return f"{run.path} has no newer checkpoint after {restarts} restarts of the job"
    if not run.has_checkpoint:
        return f"{run.path} has no checkpoint"
    if run.record.steps <= (start.resumed_at or 0):
        return (
            f"{run.path} made no step since its last start: the time limit is too short for start and compilation;"
            " submit again with a longer --time"
        )
    return None


def excluded_nodes(shown: str) -> list[str]:
    """The nodes to exclude of the job that `scontrol show job` has `shown`, as Slurm writes them."""
    match = re.search(r"\bExcNodeList=(\S+)", shown)
    return [] if match is None or match[1] == "(null)" else [match[1]]


def job_name_for_slurm(environ: Mapping[str, str]) -> str:
    """`120_3` for a task of an array, whose own id could also mean the whole array, else `123`."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else value_of("SLURM_JOB_ID", environ)
