"""`nanogpt submit`: what `slurm/run.sh RECIPE` does: check, work out the resources, and sbatch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nanogpt.cli.validate import LookedAtOnOption, SetOption, StepsOption, recipe_names

RecipeOrResume = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A file, or the name of a shipped recipe. May be left out with --resume.",
        autocompletion=recipe_names,
    ),
]
ResumeOption = Annotated[
    Path | None, typer.Option("--resume", metavar="RUN_DIR", help="Go on from this run's newest checkpoint.")
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


def submit(
    recipe: RecipeOrResume = None,
    sbatch_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- SBATCH OPTIONS]", help="Handed to sbatch, and stronger than what is worked out."),
    ] = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: LookedAtOnOption = None,
    data: DataOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    runs: Annotated[
        int | None,
        typer.Option("--runs", min=1, max=1000, metavar="N", help="An array of N runs, each with a seed of its own."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sbatch command, and submit nothing.")] = False,
) -> None:
    """Validate RECIPE, work out nodes, GPUs, CPUs, memory, time and log from it, and submit the job.

    Started by slurm/run.sh, outside of a job. Partition and account: SBATCH_PARTITION, SBATCH_ACCOUNT, or after `--`.
    """
    from nanogpt.cluster.at_hand import to_be_said
    from nanogpt.cluster.job_step import SCRIPTS, RunArguments
    from nanogpt.cluster.outside import ask_or_fail
    from nanogpt.cluster.preflight import check_shards, raise_for_failures
    from nanogpt.cluster.request import LOG, job_request, sbatch_command, shown
    from nanogpt.console import say
    from nanogpt.errors import InputError

    scripts = os.environ.get(SCRIPTS)
    if scripts is None:
        raise InputError("submit: start it by slurm/run.sh RECIPE, which has sbatch at hand outside of the image")
    arguments = RunArguments(recipe, overrides or (), steps, data, out, resume, on).with_environment(os.environ)
    arguments = arguments.settled(to_be_said)
    spec = arguments.spec()
    shards = check_shards(spec, arguments.data_directory(spec))
    if dry_run:
        for check in shards:
            if check.status != "passed":
                say(f"{check}")
    else:
        raise_for_failures(shards)
    command = sbatch_command(
        job_request(spec),
        f"{scripts}/run.sh",
        arguments.words(),
        environ=os.environ,
        runs=runs,
        extra=sbatch_options or (),
    )
    typer.echo(shown(command))
    if dry_run:
        return
    try:
        Path(LOG).parent.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{Path(LOG).parent.absolute()}: cannot be made for the job's log: {error.strerror}"
        ) from error
    said = ask_or_fail(*command).strip()
    typer.echo(said)
    job = said.split()[-1]
    say(f"Follow it: {scripts}/nanogpt.sh watch {job}; all of them: {scripts}/nanogpt.sh status")
