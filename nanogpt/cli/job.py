"""`nanogpt job`: what `slurm/run.sh` and `slurm/warm.sh` do inside a Slurm job. Not for users."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nanogpt.cli.submit import DataOption, ForSlurm, OutOption, RecipeOrResume, ResumeOption, submit_warm
from nanogpt.cli.validate import OnOption, SetOption, StepsOption

job = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="What slurm/run.sh and slurm/warm.sh do inside a job. Not for users.",
)

job.command("submit-warm", cls=ForSlurm, short_help="Submit slurm/warm.sh RECIPE.")(submit_warm)

JOIN_TIMEOUT_S = 300  # for all nodes to arrive; images may start slowly


@job.command(cls=ForSlurm, short_help="Print the srun command of this job.")
def plan(
    recipe: RecipeOrResume = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: OnOption = None,
    data: DataOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    runs: Annotated[str | None, typer.Option("--runs", hidden=True)] = None,
) -> None:
    """Check the job against RECIPE and print its srun command, words ended by NUL; nothing if it is finished."""
    from nanogpt.cluster.job_step import RunArguments, plan_step
    from nanogpt.errors import InputError
    from nanogpt.terminal import verbatim

    if runs is not None:
        raise InputError("--runs: submits an array of jobs; use slurm/run.sh --runs N RECIPE, without sbatch")
    words = plan_step(RunArguments(recipe, overrides or (), steps, data, out, resume, on), os.environ)
    verbatim(sys.stdout).write("".join(f"{word}\0" for word in words))


@job.command(cls=ForSlurm, short_help="Copy image and shards to this node's disk.")
def stage(
    recipe: RecipeOrResume = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: OnOption = None,
    data: DataOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
) -> None:
    """Copy image and shards to this node's disk, NANOGPT_STAGE, unless they are there."""
    from nanogpt.cluster.job_step import RunArguments
    from nanogpt.cluster.staging import stage as copy
    from nanogpt.environment import expanded_path, value_of

    arguments = RunArguments(recipe, overrides or (), steps, data, out, resume, on).with_environment(os.environ)
    spec = arguments.spec()
    directory = arguments.data_directory(spec)
    shards = sorted({*directory.glob(spec.data.train_files), *directory.glob(spec.data.val_files)})
    copy(
        expanded_path(value_of("NANOGPT_STAGE"), "NANOGPT_STAGE"),
        image=Path(value_of("NANOGPT_SIF")),
        shards=shards,
        manifests=sorted(directory.glob("*.json")),
    )


@job.command(cls=ForSlurm)
def node(
    nodes: Annotated[int, typer.Option("--nodes")],
    ranks: Annotated[int, typer.Option("--ranks")],
    endpoint: Annotated[str, typer.Option("--endpoint")] = "",
    recipe: RecipeOrResume = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: OnOption = None,
    data: DataOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
) -> None:
    """On each node: preflight, then the ranks."""
    from nanogpt.cluster.job_step import RunArguments
    from nanogpt.cluster.preflight import preflight, raise_for_failures
    from nanogpt.cluster.staging import check_staged, stage_directory
    from nanogpt.console import say
    from nanogpt.environment import number_of

    arguments = RunArguments(recipe, overrides or (), steps, data, out, resume, on)
    spec, words = arguments.spec(), arguments.words()
    on_cpu = spec.hardware.gpu == "cpu"
    if nodes == 1:
        os.environ.setdefault("NCCL_IB_DISABLE", "1")  # one node needs no InfiniBand, and looking for it takes seconds
    cpus = number_of("SLURM_CPUS_PER_TASK", 0) or number_of("SLURM_CPUS_ON_NODE", 0)
    if on_cpu and cpus:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus // ranks)))
    index = number_of("SLURM_NODEID", 0, most=nodes - 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # an early one waits for the launcher
    stage, shards = os.environ.get("NANOGPT_STAGE"), arguments.data_directory(spec)
    if stage and shards.is_relative_to(stage_directory(Path(stage))):
        check_staged(Path(stage), shards)
    with _pid_file(index):
        checks = preflight(spec, shards, arguments.output_directory(spec), os.environ)
        if os.environ.get("NANOGPT_PREFLIGHT") == "warn":
            say("preflight: NANOGPT_PREFLIGHT=warn: continuing in spite of failures")
        else:
            raise_for_failures(checks, printed=True)
        import torch.distributed  # noqa: F401, mapped and then read

        from nanogpt.launch.launcher import launch
        from nanogpt.launch.page_cache import keep_code_in_memory

        keep_code_in_memory(os.environ)
        several = [
            f"--nnodes={nodes}",
            f"--node-rank={index}",
            f"--rdzv-endpoint={endpoint}",
            f"--rdzv-id={os.environ.get('SLURM_JOB_ID', '0')}",
            f"--rdzv-conf=join_timeout={JOIN_TIMEOUT_S}",
        ]
        where = ["--standalone"] if nodes == 1 else several
        sys.exit(launch([*where, f"--nproc-per-node={ranks}", "--", *words]))


@contextmanager
def _pid_file(index: int) -> Iterator[None]:
    """Where `slurm/run.sh` finds the process to signal on this node: a name that nobody else can guess."""
    name = os.environ.get("NANOGPT_PID_FILE")
    if not name:
        yield
        return
    path = Path(f"{name}.{index}")
    partial = path.with_name(f".{path.name}")
    with contextlib.suppress(OSError):  # without it the run ends at its time limit, with its last checkpoint
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{os.getpid()}\n")
        partial.rename(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


@job.command(cls=ForSlurm, short_help="Whether this job should be requeued.")
def requeue(
    lost: Annotated[list[str] | None, typer.Option("--lost", metavar="NODE", help="Node that does not answer.")] = None,
    recipe: RecipeOrResume = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: OnOption = None,
    data: DataOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
) -> None:
    """Whether this job should go back into the queue: would its interrupted run get further next time?

    Prints three lines: the job's name, the nodes to leave out, and the command to continue by hand; the last two may be
    empty.
    """
    from nanogpt.cluster.job_runs import excluded_nodes, job_name_for_slurm, newest_run, requeue_refusal
    from nanogpt.cluster.job_step import RunArguments
    from nanogpt.cluster.outside import ask_or_fail
    from nanogpt.console import say
    from nanogpt.errors import RunError

    arguments = RunArguments(recipe, overrides or (), steps, data, out, resume, on).with_environment(os.environ)
    runs = arguments.output_directory(arguments.spec())
    run, name, nodes = newest_run(runs, os.environ), job_name_for_slurm(os.environ), ",".join(lost or ())
    by_hand = ""
    if lost:
        say(f"node {nodes} does not answer: it is lost, or about to be")
        if run is not None and run.has_checkpoint:
            by_hand = f"slurm/run.sh --resume {run.path} -- --exclude={nodes}"
    refusal = requeue_refusal(run, os.environ, lost=bool(lost)) if run else f"no run of this job in {runs}"
    if refusal:
        raise RunError(f"not requeued: {refusal}" + (f". By hand: {by_hand}" if by_hand else ""))
    state = ask_or_fail("squeue", "--noheader", f"--jobs={name}", "--format=%T").strip()
    if state != "RUNNING":  # cancelled, or preempted and requeued by Slurm itself
        raise RunError(f"not requeued: job {name} is {state or 'gone'}")
    without = [*excluded_nodes(ask_or_fail("scontrol", "show", "job", name)), *lost] if lost else []
    start = "continues from its checkpoint" if run and run.has_checkpoint else "has no checkpoint and starts over"
    say(f"requeued: job {name} {start} when it starts again")
    typer.echo(f"{name}\n{','.join(without)}\n{by_hand}")
