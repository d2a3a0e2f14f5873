"""`nanogpt bench`: how fast the kernels and a training step are on this machine."""

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

if TYPE_CHECKING:
    from nanogpt.training.trainer import Trainer

bench = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__)


@bench.command("step")
def step(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    steps: Annotated[int, typer.Option(help="Steps timed in each stage.", min=2)] = 12,
    warmup: Annotated[int, typer.Option(help="Untimed steps before them.", min=2)] = 4,
    data: Annotated[Path | None, typer.Option(help="Directory of token shards; made-up tokens if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures to this file, as JSON.")] = None,
) -> None:
    """Milliseconds a training step in each stage of RECIPE, with tokens/s, model FLOP utilisation and peak memory."""
    from nanogpt.bench.steps import as_json, as_table, time_stages
    from nanogpt.console import print_report

    with _trainer(recipe, overrides, on, data) as trainer:
        timings = []
        for timing in time_stages(trainer, steps=steps, warmup_steps=warmup):
            timings.append(timing)
            if trainer.world.is_main:  # the table comes when all are there
                typer.echo(f"stage {timing.stage + 1}: {timing.median_ms:.1f} ms a step", err=True)
        if trainer.world.is_main:
            print_report([as_table(timings, trainer)])
            if out is not None:
                out.write_text(json.dumps(as_json(timings, trainer), indent=1) + "\n")


@contextmanager
def _trainer(recipe: str, overrides: list[str] | None, on: str | None, data: Path | None) -> Iterator[Trainer]:
    """The recipe's trainer, ready to step, on `data` or on made-up tokens."""
    from nanogpt.cache.compile_cache import cache_directory, compile_cache
    from nanogpt.cluster.at_hand import at_hand
    from nanogpt.data.made_up import write_made_up_shards
    from nanogpt.launch.world import join_world
    from nanogpt.recipe import load_recipe
    from nanogpt.training.implementations import compiles
    from nanogpt.training.startup import StartUp, phases_table
    from nanogpt.training.trainer import Trainer

    spec = load_recipe(recipe, [*(overrides or ()), "data.epochs=null"], on=on, fill=at_hand(os.environ))
    startup = StartUp()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with startup.phase("device and process group"):
            world = stack.enter_context(join_world(spec))
        if data is None:
            with startup.phase("made-up tokens"):
                largest = max(stage.batch_tokens for stage in spec.training.all_stages)
                sizes = {"train_tokens": 20 * largest, "val_tokens": spec.evaluation.tokens + 1}
                write_made_up_shards(scratch, **sizes, bos=spec.data.bos)
        with startup.phase("compiler, compile cache"):
            kept_in = cache_directory(spec.output.directory) if compiles(spec, world.device) else None
            cache = stack.enter_context(compile_cache(spec, world, kept_in))
        place: dict[str, Any] = {"run": None, "data_directory": data or scratch}
        trainer = stack.enter_context(Trainer(spec, world, **place, cache=cache, startup=startup))
        with startup.phase("compiling, by several processes"):
            trainer.compile_in_parallel()
        if world.is_main:
            typer.echo("\n".join([*cache.lines, *phases_table(startup.phases())]), err=True)
        yield trainer


@bench.command("profile")
def profile(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    warmup: Annotated[int, typer.Option(help="Unprofiled steps before them, in each stage.", min=2)] = 4,
    rows: Annotated[int, typer.Option(help="Kernels listed for each stage.", min=1)] = 25,
    traces: Annotated[Path | None, typer.Option(help="Keep every rank's Chrome traces in this directory.")] = None,
) -> None:
    """Where a training step's time goes on the GPU, kernel by kernel, in each stage of RECIPE.

    On several GPUs, nanogpt launch --bench profile RECIPE also tells how much of the communication
    is exposed.
    """
    from nanogpt.bench import exposed
    from nanogpt.bench.profile import as_table, parts_table, profile_stages
    from nanogpt.console import print_report
    from nanogpt.errors import InputError

    with _trainer(recipe, overrides, on, None) as trainer:
        if trainer.world.device.type != "cuda":
            raise InputError(f"bench profile: {recipe} runs on a CPU; say a GPU, --on 1xh100")
        if traces is not None:
            traces.mkdir(parents=True, exist_ok=True)
        stages = []
        for stage in profile_stages(trainer, warmup_steps=warmup, traces=traces):
            stages.append(stage)
            if trainer.world.is_main:
                print_report([as_table(stage, rows)])
        by_rank = trainer.world.gather([stage.exposure for stage in stages], list[exposed.Exposure])
        if trainer.world.is_main:
            print_report([parts_table(stages)])
            if trainer.world.size > 1:
                print_report([exposed.as_table(list(zip(*by_rank, strict=True)))])


@bench.command("timeline")
def timeline(
    traces: Annotated[
        Path, typer.Argument(help="Directory that `bench profile --traces` wrote.", exists=True, file_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="The picture, .png or .svg.")] = Path("timeline.png"),
    rank: Annotated[int, typer.Option(help="Rank whose GPU is drawn.", min=0)] = 0,
) -> None:
    """A picture of the communication in a step of each stage: what is hidden by computing, and what is exposed."""
    from nanogpt.bench.timeline import plot_timeline, read_stages

    plot_timeline(read_stages(traces, rank), out)
    typer.echo(f"written: {out}")


@bench.command("kernels")
def kernels(
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
) -> None:
    """Each kernel against its plain PyTorch equal and against what this GPU's copies and products reach."""
    import torch

    from nanogpt.bench.kernels import TABLE_HEAD, all_bench_cases, as_row, machine_rates, run_cases
    from nanogpt.cache.compile_cache import places_of_this_job
    from nanogpt.errors import InputError

    if not torch.cuda.is_available():
        raise InputError("bench kernels: PyTorch sees no GPU here (apptainer needs --nv)")
    rates = machine_rates()
    typer.echo(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}:"
        f" bf16 product {rates.matmul_flops / 1e12:.0f} TFLOP/s, copy {rates.copy_bytes / 1e12:.2f} TB/s\n"
    )
    typer.echo(TABLE_HEAD)
    with places_of_this_job(os.environ.get("TORCHINDUCTOR_CACHE_DIR")):
        for result in run_cases((case for case in all_bench_cases() if only in case.name), rates):
            typer.echo(as_row(result))


@bench.command("communication")
def communication(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: OnOption = None,
    repeats: Annotated[int, typer.Option(help="Repetitions of each measurement.", min=1)] = 20,
) -> None:
    """The gradient of each table of rows over ranks, whole or by touched rows: milliseconds and bytes in each stage.

    nanogpt launch --bench communication RECIPE
    """
    from nanogpt.bench.communication import as_table, time_row_table
    from nanogpt.cluster.at_hand import at_hand
    from nanogpt.console import print_report
    from nanogpt.errors import InputError
    from nanogpt.launch.world import join_world
    from nanogpt.recipe import load_recipe

    spec = load_recipe(recipe, overrides or (), on=on, fill=at_hand(os.environ))
    if not spec.model.row_tables():
        raise InputError(f"bench communication: the model of {recipe} has no table of rows; name a recipe of a record")
    if spec.world_size == 1:
        raise InputError(
            f"bench communication: {recipe} runs on one process here; it takes several:"
            f" nanogpt launch --bench communication {recipe} --on 4xh100"
        )
    with join_world(spec) as world:
        for table in spec.model.row_tables():
            timings = list(time_row_table(spec, table, world, repeats=repeats))
            if world.is_main:
                print_report([table.parameter, as_table(timings)])
