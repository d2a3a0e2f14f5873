"""`nanogpt submit`, which `slurm/run.sh RECIPE` calls: check, work out the resources, and run sbatch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanogpt.cli.entry import Command
from nanogpt.cli.validate import LookedAtOnOption, RecipeArgument, SetOption, StepsOption, recipe_names
from nanogpt.cli.warm import CacheOutOption, FreshOption, WorldSizesOption

if TYPE_CHECKING:
    from nanogpt.cluster.request import JobRequest

RecipeOrResume = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A file, or the name of a shipped recipe. May be left out with --resume.",
        autocompletion=recipe_names,
    ),
]
ResumeOption = Annotated[
    Path | None, typer.Option("--resume", metavar="RUN_DIR", help="Continue from this run's newest checkpoint.")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Directory of the token shards.", show_default="as for nanogpt train"),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Where the run's directory is made.", show_default="as for nanogpt train"
    ),
]

SbatchOptions = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- SBATCH OPTIONS]", help="Passed to sbatch; they override what is worked out."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the sbatch command, and submit nothing.")]
ParsableOption = Annotated[
    bool, typer.Option("--parsable", help="Print only the job's id (`12`, `12;CLUSTER`), as sbatch does, for scripts.")
]


class ForSlurm(Command):
    """Everything after `--` is for sbatch; an unknown option may also be one of sbatch's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments. Raises `InputError` if one is sbatch's and not in its place."""
        from nanogpt.errors import InputError

        at = args.index("--") if "--" in args else len(args)
        theirs = args[at + 1 :]
        submits = any(parameter.name == "sbatch_options" for parameter in self.params)
        place = "after --: slurm/run.sh RECIPE --" if submits else "before the script: sbatch"
        if theirs and not submits:
            raise InputError(f"{theirs[0]}: is too late inside a job. Options of sbatch go {place} {theirs[0]}")
        try:
            rest = super().parse_args(ctx, args[:at])
        except Exception as error:  # of Click, or of Typer's copy of Click
            option = getattr(error, "option_name", None)
            if option is None or not hasattr(error, "possibilities"):
                raise
            close = f" Did you mean {error.possibilities[0]}?" if error.possibilities else ""
            raise InputError(f"{option}: no such option.{close} An option of sbatch goes {place} {option}") from None
        if submits:
            if surplus := ctx.params["sbatch_options"]:
                raise InputError(f"{surplus[0]}: expected one RECIPE; options of sbatch go {place} {surplus[0]}")
            ctx.params["sbatch_options"] = theirs
        return rest


def submit(
    recipe: RecipeOrResume = None,
    sbatch_options: SbatchOptions = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: LookedAtOnOption = None,
    data: DataOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs", metavar="N[%M]", help="An array of N runs, each with its own seed; at most M at a time."
        ),
    ] = None,
    parsable: ParsableOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Validate RECIPE, work out nodes, GPUs, CPUs, memory, time and log from it, and submit the job.

    Started by slurm/run.sh, outside a job. Partition and account: SBATCH_PARTITION, SBATCH_ACCOUNT, or after `--`.
    With --dry-run the exit code is 2 if the job would be refused because of its shards.
    """
    from nanogpt.cluster.at_hand import to_be_said
    from nanogpt.cluster.job_step import RunArguments
    from nanogpt.cluster.preflight import check_shards, raise_for_failures
    from nanogpt.cluster.request import job_request
    from nanogpt.console import say

    scripts = _scripts()
    arguments = RunArguments(recipe, overrides or (), steps, data, out, resume, on).with_environment(os.environ)
    arguments = arguments.settled(to_be_said)
    spec = arguments.spec()
    shards = check_shards(spec, arguments.data_directory(spec))
    if not dry_run:
        raise_for_failures(shards)
    request = job_request(spec, os.environ)
    job = _sbatch(
        f"{scripts}/run.sh", request, arguments.words(), sbatch_options or (), runs, parsable=parsable, dry_run=dry_run
    )
    if job is None:
        raise_for_failures(shards)
    else:
        say(f"Follow it: {scripts}/nanogpt.sh watch {job}; all your jobs: {scripts}/nanogpt.sh status")


submit.command_class = ForSlurm  # type: ignore[attr-defined]


def submit_warm(
    recipe: RecipeArgument,
    sbatch_options: SbatchOptions = None,
    overrides: SetOption = None,
    on: LookedAtOnOption = None,
    world_sizes: WorldSizesOption = None,
    out: CacheOutOption = None,
    fresh: FreshOption = False,
    parsable: ParsableOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Submit slurm/warm.sh RECIPE to one GPU of the type that the runs will use."""
    from nanogpt.cluster.at_hand import to_be_said
    from nanogpt.cluster.job_step import RunArguments
    from nanogpt.cluster.request import job_request, warm_request

    scripts = _scripts()
    arguments = RunArguments(recipe, overrides or (), on=on).with_environment(os.environ).settled(to_be_said)
    words = [*arguments.words(), *(f"--world-size={size}" for size in world_sizes or ())]
    words += [*([f"--out={out}"] if out else []), *(["--fresh"] if fresh else [])]
    request = warm_request(job_request(arguments.spec(), os.environ))
    _sbatch(f"{scripts}/warm.sh", request, words, sbatch_options or (), parsable=parsable, dry_run=dry_run)


def _scripts() -> str:
    from nanogpt.cluster.job_step import SCRIPTS
    from nanogpt.errors import InputError

    scripts = os.environ.get(SCRIPTS)
    if scripts is None:
        raise InputError("submit: start it with slurm/run.sh RECIPE, which finds sbatch outside the image")
    return scripts


def _sbatch(
    script: str,
    request: JobRequest,
    words: Sequence[str],
    extra: Sequence[str],
    runs: str | None = None,
    *,
    parsable: bool,
    dry_run: bool,
) -> str | None:
    """Print the command and run it; returns the job's id, or None for a dry run."""
    from nanogpt.cluster.outside import ask_or_fail
    from nanogpt.cluster.request import LOG, sbatch_command, shown
    from nanogpt.console import say
    from nanogpt.errors import InputError

    command = sbatch_command(request, script, words, environ=os.environ, runs=runs, extra=extra)
    parsable = parsable or "--parsable" in extra
    (say if parsable else typer.echo)(shown(command))
    if dry_run:
        return None
    try:
        Path(LOG).parent.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{Path(LOG).parent.absolute()}: cannot be made for the job's log: {error.strerror}"
        ) from error
    answer = ask_or_fail(command[0], "--parsable", *command[1:]).split()[-1]
    job, _, cluster = answer.partition(";")
    typer.echo(answer if parsable else f"Submitted batch job {job}" + (f" on cluster {cluster}" if cluster else ""))
    return job
