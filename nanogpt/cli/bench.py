"""How fast the kernels and a training step are on this machine."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanogpt.cli.validate import OnOption, RecipeArgument, SetOption
from nanogpt.garbage import collect_from_now, collect_later

if TYPE_CHECKING:
    from nanogpt.spec import RunSpec
    from nanogpt.training.trainer import Trainer

bench = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__)

JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of tables.")]


@bench.command("step", short_help="Time a training step in each stage of RECIPE.")
def step(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    steps: Annotated[int, typer.Option(help="Steps timed in each stage.", min=2)] = 12,
    warmup: Annotated[int, typer.Option(help="Untimed steps before them.", min=2)] = 4,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory of token shards.", show_default="made-up tokens"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures to this file, as JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a training step in each stage of RECIPE: milliseconds, tokens/s, model FLOP utilisation, peak memory."""
    collect_later()
    spec = _trainers_spec(recipe, overrides, on)
    from nanogpt.bench import steps as timed
    from nanogpt.console import print_report

    with _trainer(spec, data) as trainer:
        timings = []
        for timing in timed.time_stages(trainer, steps=steps, warmup_steps=warmup):
            timings.append(timing)
            if trainer.world.is_main:  # the table comes when all are there
                typer.echo(f"stage {timing.stage + 1}: {timing.median_ms:.1f} ms a step", err=True)
        if trainer.world.is_main:
            figures = timed.as_json(timings, trainer)
            if as_json:
                typer.echo(json.dumps(figures, indent=2))
            else:
                print_report([timed.as_table(timings, trainer)])
            if out is not None:
                out.write_text(json.dumps(figures, indent=1) + "\n")


def _spec(recipe: str, overrides: list[str] | None, on: str | None) -> RunSpec:
    from nanogpt.cluster.at_hand import at_hand
    from nanogpt.recipe import load_recipe

    return load_recipe(recipe, [*(overrides or ()), "data.epochs=null"], on=on, fill=at_hand(os.environ))


def _trainers_spec(recipe: str, overrides: list[str] | None, on: str | None) -> RunSpec:
    """For `_trainer`. Before this process imports torch: what helps it to compile, if anything has to, imports too."""
    from nanogpt.cache.compile_cache import cache_directory
    from nanogpt.training.compile_helper import import_ahead

    spec = _spec(recipe, overrides, on)
    import_ahead(spec, cache_directory(spec.output.directory))
    return spec


@contextmanager
def _trainer(spec: RunSpec, data: Path | None = None) -> Iterator[Trainer]:
    """The recipe's trainer, ready to step, on `data` or on made-up tokens."""
    from nanogpt.cache.compile_cache import cache_directory
    from nanogpt.data.made_up import write_shards_for
    from nanogpt.launch.world import join_world
    from nanogpt.training.ahead import compiler
    from nanogpt.training.implementations import compiles
    from nanogpt.training.startup import StartUp, phases_table
    from nanogpt.training.trainer import Trainer

    startup = StartUp()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with startup.phase("device and process group"):
            world = stack.enter_context(join_world(spec))
        if data is None:
            with startup.phase("made-up tokens"):
                write_shards_for(spec, scratch)
        kept_in = cache_directory(spec.output.directory) if compiles(spec, world.device) else None
        cache = stack.enter_context(compiler(spec, world, startup, kept_in))
        place: dict[str, Any] = {"run": None, "data_directory": data or scratch}
        trainer = stack.enter_context(Trainer(spec, world, **place, cache=cache, startup=startup))
        with startup.phase("compiling, by several processes"):
            trainer.compile_in_parallel()
        collect_from_now()
        if world.is_main:
            typer.echo("\n".join([*cache.lines, *phases_table(startup.phases()), *trainer.compiling_lines]), err=True)
        yield trainer


@bench.command("profile", short_help="Say where a step's time goes on the GPU, kernel by kernel.")
def profile(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    warmup: Annotated[int, typer.Option(help="Unprofiled steps first, in each stage.", min=2)] = 4,
    rows: Annotated[int, typer.Option(help="Kernels listed for each stage.", min=1)] = 25,
    traces: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep every rank's Chrome traces in this directory.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say where a training step's time goes on the GPU, kernel by kernel, in each stage of RECIPE.

    On several GPUs, nanogpt launch --bench profile RECIPE also says how much of the communication
    is exposed.
    """
    collect_later()
    spec = _trainers_spec(recipe, overrides, on)
    from nanogpt.bench import exposed
    from nanogpt.bench import profile as profiled
    from nanogpt.console import print_report
    from nanogpt.errors import InputError

    if spec.hardware.gpu == "cpu":
        raise InputError(f"bench profile: {recipe} runs on a CPU; name a GPU, such as --on 1xh100")
    with _trainer(spec) as trainer:
        if traces is not None:
            traces.mkdir(parents=True, exist_ok=True)
        shown = trainer.world.is_main and not as_json
        stages = []
        for stage in profiled.profile_stages(trainer, warmup_steps=warmup, traces=traces):
            stages.append(stage)
            if shown:
                print_report([profiled.as_table(stage, rows)])
        by_rank = trainer.world.gather([stage.exposure for stage in stages], list[exposed.Exposure])
        exposures = list(zip(*by_rank, strict=True))
        if shown:
            print_report([profiled.parts_table(stages)])
            if trainer.world.size > 1:
                print_report([exposed.as_table(exposures)])
        elif trainer.world.is_main:
            typer.echo(json.dumps(profiled.as_json(stages, exposures, trainer), indent=2))


@bench.command("timeline", short_help="Draw the communication in a step of each stage.")
def timeline(
    traces: Annotated[
        Path, typer.Argument(help="Directory that `bench profile --traces` wrote.", exists=True, file_okay=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture, .png or .svg.")] = Path("timeline.png"),
    rank: Annotated[int, typer.Option(help="Rank whose GPU is drawn.", min=0)] = 0,
) -> None:
    """Draw the communication in a step of each stage: what is hidden behind computation, and what is exposed."""
    from nanogpt.bench.timeline import plot_timeline, read_stages

    plot_timeline(read_stages(traces, rank), out)
    typer.echo(f"written: {out}")


@bench.command("kernels", short_help="Time each kernel against plain PyTorch and the GPU's limits.")
def kernels(
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only cases whose name contains this.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Time each kernel against its plain PyTorch equivalent and against this GPU's own copies and matrix products."""
    import torch

    from nanogpt.bench import kernels as timed
    from nanogpt.cache.compile_cache import places_of_this_job
    from nanogpt.console import print_report
    from nanogpt.errors import InputError

    if not torch.cuda.is_available():
        raise InputError("bench kernels: PyTorch sees no GPU here (apptainer needs --nv)")
    rates = timed.machine_rates()
    results = []
    with places_of_this_job(os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        for result in timed.run_cases((case for case in timed.all_bench_cases() if only in case.name), rates):
            results.append(result)
            typer.echo(f"{result.kernel}, {result.shape}: {1e3 * result.fast_ms:,.0f} us", err=True)
    if as_json:
        typer.echo(json.dumps(timed.as_json(results, rates), indent=2))
    else:
        print_report(timed.as_table(results, rates))


@bench.command("communication", short_help="Time the exchange of a table's gradient, whole or by rows.")
def communication(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    repeats: Annotated[int, typer.Option(help="Repetitions of each measurement.", min=1)] = 20,
    as_json: JsonOption = False,
) -> None:
    """Time the exchange of each embedding table's gradient between ranks, whole or by touched rows, in each stage.

    Start it on several GPUs: nanogpt launch --bench communication RECIPE
    """
    from nanogpt.bench import communication as timed
    from nanogpt.console import print_report
    from nanogpt.errors import InputError
    from nanogpt.launch.world import join_world

    spec = _spec(recipe, overrides, on)
    if not spec.model.row_tables():
        raise InputError(
            f"bench communication: {recipe} has no embedding table that is exchanged by rows; name a record"
        )
    if spec.world_size == 1:
        raise InputError(
            f"bench communication: {recipe} runs on one GPU here, and this takes several:"
            f" nanogpt launch --bench communication {recipe} --on 4xh100"
        )
    with join_world(spec) as world:
        tables = {}
        for table in spec.model.row_tables():
            timings = tables[table.parameter] = list(timed.time_row_table(spec, table, world, repeats=repeats))
            if world.is_main and not as_json:
                print_report([table.parameter, timed.as_table(timings)])
        if world.is_main and as_json:
            typer.echo(json.dumps(timed.as_json(tables, spec, world), indent=2))
