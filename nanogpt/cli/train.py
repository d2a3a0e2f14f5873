"""`nanogpt train`: take a run from its recipe to its result."""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from nanogpt.cli.validate import OnOption, SetOption, StepsOption, recipe_names
from nanogpt.garbage import collect_later
from nanogpt.threads import initialise_driver, wait_briefly


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A file, or the name of a shipped recipe. May be left out with --resume.",
            autocompletion=recipe_names,
        ),
    ] = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    on: OnOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Directory of the token shards.",
            show_default="data.directory of the recipe, else NANOGPT_DATA, else data/fineweb10B",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where the run's directory is made.",
            show_default="output.directory of the recipe, else NANOGPT_RUNS, else ./runs",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="RUN_DIR", help="Continue from this run's newest checkpoint, on any hardware (--on)."
        ),
    ] = None,
) -> None:
    """Train RECIPE; checkpoints, log and metrics go to the run's own directory.

    On several GPUs: nanogpt launch RECIPE, or torchrun ... -m nanogpt train RECIPE.

    SIGTERM, SIGUSR1 or Ctrl-C ends the run after its step, with a checkpoint and exit code 75; --resume continues.
    """
    wait_briefly()
    initialise_driver()
    collect_later()
    from nanogpt.cache.compile_cache import cache_directory
    from nanogpt.errors import InputError, Interrupted, NanogptError
    from nanogpt.recipe import load_recipe
    from nanogpt.runs.directory import RunDirectory, output_directory
    from nanogpt.training.compile_helper import import_ahead

    if recipe is not None and resume is None:
        with contextlib.suppress(NanogptError):  # it is raised again below
            inspected = load_recipe(recipe, overrides or (), steps, on=on)
            import_ahead(inspected, cache_directory(out or output_directory(inspected)))

    from nanogpt.background import GivenUp, Worker, wait_for
    from nanogpt.cluster.at_hand import at_hand, check_type
    from nanogpt.console import say
    from nanogpt.launch.watchdog import Watchdog
    from nanogpt.launch.world import started_as
    from nanogpt.runs.claim import RunClaim
    from nanogpt.runs.data_files import shards_directory
    from nanogpt.spec import RunSpec
    from nanogpt.training.agreement import Start, agree, describe_start
    from nanogpt.training.checkpoint import list_checkpoints
    from nanogpt.training.recorder import create_run
    from nanogpt.training.resume import check_checkpoints, check_not_running, resumed_data_directory, resumed_spec
    from nanogpt.training.trainer import check_start, train_run

    if resume is not None and out is not None:
        raise InputError("--out: a resumed run stays in its directory; leave out --out, or --resume")
    if resume is None and recipe is None:
        raise InputError("train: name a RECIPE (`nanogpt recipes` lists them), or a run to continue with --resume")
    rank, size, _ = started_as()
    is_main = rank == 0

    with ExitStack() as stack, Watchdog(rank, size) as watch:
        run: RunDirectory | None = None
        spec: RunSpec | None = None

        def prepare() -> Start:
            nonlocal run, spec, data
            if resume is not None:
                run = RunDirectory.open(resume)
                if is_main:
                    check_not_running(run)
                spec = resumed_spec(run, recipe, overrides or (), steps, on=on)
            else:
                assert recipe is not None
                spec = load_recipe(recipe, overrides or (), steps, on=on, fill=at_hand(os.environ))
            check_type(spec.hardware, os.environ)
            watch.limits = spec.watchdog
            data = data or (resumed_data_directory(run, spec) if run is not None else shards_directory(spec))
            files = check_start(spec, data)
            if run is not None and is_main:
                stack.enter_context(RunClaim(run.path, asked=lambda: watch.asked))
                check_checkpoints(run, spec)
            checkpoints = list_checkpoints(run.checkpoint_directory) if run else []
            return describe_start(spec, files, watch.host, checkpoints[-1].name if checkpoints else None)

        def prepare_or_stop() -> Start:
            worker = Worker("preparing")
            prepared = worker.submit(prepare)
            worker.close(0)
            try:
                return wait_for(prepared, lambda: watch.asked)
            except GivenUp as error:
                raise Interrupted(
                    f"{error}: the run stopped before its first step, while it waited for a file of {resume or recipe}"
                    f" or its data ({data or 'data.directory'}); there is nothing to save; start it again"
                ) from None

        agree(prepare_or_stop, watch)
        assert spec is not None and data is not None
        if run is None and is_main:
            run = create_run(out or output_directory(spec), spec)
        if run is not None and is_main:
            say(f"Run directory: {run.path}")
        train_run(spec, run=run, data_directory=data, resume=resume is not None, watch=watch)

        if run is not None and is_main:
            from nanogpt.console import print_table
            from nanogpt.runs.metrics import read_run
            from nanogpt.runs.table import run_summary, run_table

            print_table(run_table(run_summary(read_run(run.path))))
            typer.echo(f"Run directory: {run.path}")
