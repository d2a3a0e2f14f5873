"""`nanogpt preflight`: check that this machine is fit for a run of RECIPE."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from nanogpt.cli.submit import DataOption, OutOption
from nanogpt.cli.validate import OnOption, RecipeArgument, SetOption, StepsOption


def preflight(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: OnOption = None,
    data: DataOption = None,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Also print the checks as JSON on standard output.")] = False,
) -> None:
    """Check GPUs, driver, memory, links, shards, output, space and image, in under 20 seconds, compiling nothing.

    slurm/run.sh does this on every node of a job. Exit code 2: a check failed.
    """
    import json

    from nanogpt.cluster.at_hand import at_hand
    from nanogpt.cluster.job_step import RunArguments
    from nanogpt.cluster.preflight import preflight as check
    from nanogpt.cluster.preflight import raise_for_failures

    arguments = RunArguments(recipe, overrides or (), steps, data, out, on=on).with_environment(os.environ)
    arguments = arguments.settled(at_hand(os.environ))
    spec = arguments.spec()
    checks = check(spec, arguments.data_directory(spec), arguments.output_directory(spec), os.environ)
    if as_json:
        typer.echo(json.dumps([one._asdict() for one in checks], indent=2))
    raise_for_failures(checks, printed=True)
