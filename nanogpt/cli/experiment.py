"""An idea against the recipe that it changes, on the GPUs of one machine."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from nanogpt.cli.entry import Command
from nanogpt.cli.validate import OnOption, RecipeArgument, SetOption, StepsOption
from nanogpt.garbage import collect_later
from nanogpt.threads import wait_briefly

experiment = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__)

RUNS = Path("runs")
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Directory of the token shards.",
        show_default="data.directory of the recipe, else NANOGPT_DATA, else data/fineweb10B",
    ),
]
BeforeOption = Annotated[
    list[int] | None,
    typer.Option("--before", metavar="N...", help="End: the weights of N steps before the last."),
]
WindowsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--windows",
        metavar="SHORT:LONG...",
        help="End: the last weights with these attention windows, in blocks.",
    ),
]

HorizonOption = Annotated[
    list[int] | None,
    typer.Option(
        "--horizon",
        metavar="N...",
        help="Ends: (1 - g) w + g EMA over the last N steps, norms kept, for each N and each g of --blend.",
    ),
]
BlendOption = Annotated[
    list[float] | None,
    typer.Option("--blend", metavar="G...", help="With --horizon.", show_default="0.25 0.35 0.45 0.55 0.65"),
]
BlendedOption = Annotated[
    list[str] | None,
    typer.Option("--blended", metavar="PARAMETER...", help="With --horizon: blend these.", show_default="all"),
]
ValidateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--validate",
        metavar="NAME=DIR...",
        help="Evaluate the ends on the validation shards of these directories too.",
    ),
]
BLENDS = (0.25, 0.35, 0.45, 0.55, 0.65)


class _TakesLists(Command):
    """A command some of whose options take every argument up to the next option."""

    joined = ("--gpus", "--idea")  # to one value, which `_named_list` takes apart
    repeated = ("--before", "--windows", "--horizon", "--blend", "--blended", "--validate")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        at = 0
        while at < len(args):
            flag = args[at]
            at += 1
            if flag not in (*self.joined, *self.repeated):
                given.append(flag)
                continue
            values = list(itertools.takewhile(lambda argument: not argument.startswith("--"), args[at:]))
            at += len(values)
            for value in [shlex.join(values)] if flag in self.joined else values:
                given += [flag, value]
        return super().parse_args(ctx, given)


@experiment.command("run", cls=_TakesLists, short_help="Measure RECIPE, and ideas against it.")
def run(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of all results.", show_default=False)],
    recipe: RecipeArgument,
    gpus: Annotated[
        list[str],
        typer.Option(
            "--gpus",
            metavar="GPU[,GPU...] NAME...",
            help="Measure these one after another on this GPU, or on these together. Repeat it for GPUs side by side.",
        ),
    ],
    idea: Annotated[
        list[str] | None,
        typer.Option(
            "--idea",
            metavar="NAME KEY=VALUE...",
            help="Add NAME, NAME-step and NAME-profile: fast and the benchmarks with these settings. May be repeated.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="PREFIX=RECIPE",
            help="Add the measurements of another recipe: PREFIX-fast, PREFIX-step, ... May be repeated.",
        ),
    ] = None,
    overrides: SetOption = None,
    data: DataOption = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, metavar="N", help="Length of the runs that are compared.")
    ] = 300,
    limit: Annotated[
        float | None,
        typer.Option("--limit", min=0, metavar="SECONDS", help="Stop what is still running after this time."),
    ] = None,
    before: BeforeOption = None,
    windows: WindowsOption = None,
    horizon: HorizonOption = None,
    blend: BlendOption = None,
    blended: BlendedOption = None,
    validate: ValidateOption = None,
) -> None:
    """Measure RECIPE, and ideas against it, on the GPUs of this machine, and print tables at the end.

    --gpus sets how many GPUs a run uses; their type comes from the recipe, or from the machine if the recipe leaves
    hardware open.

    Measurements of RECIPE: fast, a run shortened to --steps; again, the same once more; plain, without fused kernels
    and 8-bit numbers; whole, the whole schedule; full, the whole schedule with other ends (--before, --windows,
    --horizon); warm, 40 steps; deterministic and deterministic-again, 40 steps that should agree bit for bit; step,
    profile, communication and kernels, from `nanogpt bench`.

    fast:1 is fast with seed 1, and is compared with the idea's :1. fast:1@100 ends at the first evaluation at or after
    step 100.

    nanogpt experiment run OUT record89 --idea late optimizer.normuon.lr=0.02 --gpus 0 fast:1 late:1 --gpus 1
    fast:2 late:2

    Run the same command again to measure what is not finished. Each NAME has a log, OUT/NAME.txt, and a result,
    OUT/NAME.json; its runs are in OUT/runs/NAME, the tables in OUT/report.md. Exit code 1: a measurement failed.
    """
    from nanogpt.cluster.at_hand import at_hand
    from nanogpt.console import print_report, print_table, say
    from nanogpt.errors import InputError, RunError
    from nanogpt.experiment.comparison import report, runs_to_compare
    from nanogpt.experiment.measurements import measurements
    from nanogpt.experiment.queues import Place, make_queues, run_queues
    from nanogpt.runs.compare import comparison_data, comparison_table
    from nanogpt.runs.directory import write_whole
    from nanogpt.runs.loaded import load_runs

    recipes = {"": recipe}
    for text in also or ():
        prefix, equals, other = text.partition("=")
        if not (prefix and equals and other):
            raise InputError(f"--also {text}: expected PREFIX=RECIPE")
        recipes[f"{prefix}-"] = other
    ideas = dict(_named_list("--idea", text, "NAME KEY=VALUE...") for text in idea or ())
    options = []
    listed: dict[str, Sequence[object] | None] = {
        "--before": before,
        "--windows": windows,
        "--horizon": horizon,
        "--blend": blend,
        "--blended": blended,
    }
    for flag, values in listed.items():
        options += [part for value in values or () for part in (flag, str(value))]
    known = measurements(
        recipes,
        steps=steps,
        settings=overrides or (),
        ideas=ideas,
        end_options=options,
        validations=_directories(validate),
        fill=at_hand(os.environ),
    )
    place = Place(out.resolve(), None if data is None else data.resolve())
    queues = make_queues([_named_list("--gpus", text, "GPU NAME...") for text in gpus], known, place)
    try:
        place.out.mkdir(parents=True, exist_ok=True)
        with _sigterm_stops():
            outcomes = run_queues(queues, limit)
        lines = report(place, list(recipes), ideas, outcomes)
        write_whole(place.out / "report.md", "\n".join(lines) + "\n")
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror}; name another OUT") from error
    for prefix in recipes:
        if len(paths := runs_to_compare(place, prefix)) > 1:
            try:
                print_table(comparison_table(comparison_data(load_runs(paths))))
            except InputError as error:  # one that was cut off has little to show
                say(str(error))
    print_report(lines)
    if any(outcome.code != 0 for outcome in outcomes):
        raise typer.Exit(1)


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Let SIGTERM stop the running measurements before this process ends."""
    from nanogpt.errors import Interrupted

    def stop(_number: int, _frame: object) -> NoReturn:
        raise Interrupted("SIGTERM: measurements were stopped; the same command again measures what is not finished")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _named_list(flag: str, text: str, form: str) -> tuple[str, list[str]]:
    from nanogpt.errors import InputError

    first, *rest = shlex.split(text) or [""]
    if not rest:
        raise InputError(f"{flag} {first}: expected {form}")
    return first, rest


@experiment.command("ends", cls=_TakesLists, short_help="Train RECIPE, and evaluate other ends of the run.")
def ends(
    recipe: RecipeArgument,
    on: OnOption = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    data: DataOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the run's directory is made.")] = Path(
        "runs"
    ),
    before: BeforeOption = None,
    windows: WindowsOption = None,
    horizon: HorizonOption = None,
    blend: BlendOption = None,
    blended: BlendedOption = None,
    validate: ValidateOption = None,
) -> None:
    """Train RECIPE, then evaluate other ends of the run on the same validation tokens, and write RUN_DIR/ends.json.

    The GPU keeps a copy of the weights for each end: in bf16, or in fp32 for a horizon. Pulled tables stay as
    the last step left them.

    On several GPUs: nanogpt launch --nproc-per-node N --experiment ends RECIPE ...
    """
    wait_briefly()
    collect_later()
    from nanogpt.cluster.at_hand import at_hand
    from nanogpt.console import print_report
    from nanogpt.experiment.ends import Ends, ends_table, train_with_ends
    from nanogpt.launch.world import started_as
    from nanogpt.recipe import load_recipe
    from nanogpt.runs.data_files import shards_directory
    from nanogpt.training.recorder import create_run
    from nanogpt.training.trainer import check_start

    spec = load_recipe(recipe, overrides or (), steps, on=on, fill=at_hand(os.environ))
    chosen = Ends(
        before=before or (),
        windows=[_blocks(text) for text in windows or ()],
        horizons=horizon or (),
        blends=blend or (BLENDS if horizon else ()),
        blended=blended or (),
        validations=_directories(validate),
    )
    chosen.check(spec)
    data = data or shards_directory(spec)
    check_start(spec, data)
    run = create_run(out, spec) if started_as()[0] == 0 else None
    found = train_with_ends(spec, chosen, run=run, data_directory=data)
    if run is not None:
        print_report(ends_table(found))
        typer.echo(f"Run directory: {run.path}")


def _directories(texts: Sequence[str] | None) -> dict[str, Path]:
    """Of NAME=DIR."""
    from nanogpt.errors import InputError

    found = {}
    for text in texts or ():
        name, equals, directory = text.partition("=")
        if not (name and equals and directory) or name in found:
            raise InputError(f"--validate {text}: expected NAME=DIR, each name once")
        found[name] = Path(directory).resolve()
    return found


def _blocks(text: str) -> tuple[int, int]:
    """(6, 20) of "6:20"."""
    from nanogpt.errors import InputError

    short, _, long = text.partition(":")
    if not (short.isdecimal() and long.isdecimal() and 0 < int(short) <= int(long)):
        raise InputError(f"--windows {text}: expected SHORT:LONG in blocks, such as 6:20")
    return int(short), int(long)
