"""`nanogpt launch`: start the ranks of `nanogpt train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main

from nanogpt.cli.entry import Command

if TYPE_CHECKING:
    from nanogpt.spec import HardwareSpec


class _AsGiven(Command):
    """Leaves every argument except a lone --help to the function."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args in (["--help"], ["-h"], []):
            return super().parse_args(ctx, ["--help"])
        ctx.params = {"arguments": args}
        return []


def launch(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTIONS ABOVE] [--] RECIPE [TRAIN OPTIONS]", show_default=False),
    ] = None,
) -> None:
    """Train on several GPUs or nodes: options named like torchrun's, then the arguments of `nanogpt train`.

    \b
    nanogpt launch record89                  all GPUs of this machine
    nanogpt launch record89 --on 4xh200      four of them
    nanogpt launch -- --resume RUN_DIR       continue a run
    nanogpt launch --nnodes 2 --rdzv-endpoint NODE:29500 --rdzv-id JOB 2x4xh100
                                             on each of two nodes

    \b
    --nproc-per-node N   processes on this node, or `gpu` for one on each GPU;
                         default: one for each GPU of --on, of the recipe, or
                         of this machine
    --standalone         one node (the default)
    --nnodes N           number of nodes
    --rdzv-endpoint HOST:PORT, or --master-addr and --master-port
                         where nodes meet: the first one's address in the
                         cluster's network
    --rdzv-id ID         tells runs apart
    --node-rank I        this node's number; default: in order of arrival
    --local-addr ADDRESS where the first node listens, if not at HOST
    --rdzv-conf join_timeout=SECONDS,is_host=true|false
                         how long to wait for other nodes (600)
    --grace SECONDS      how long a run may take to end after a signal (600)
    --bench              run `nanogpt bench` on all ranks:
                         --bench profile 4xh100
    --experiment         run `nanogpt experiment` on all ranks:
                         --experiment ends 4xh100

    SIGTERM and SIGUSR1 end the run after its current step, with a checkpoint and exit code 75.
    """
    from nanogpt.launch.launcher import launch as run

    sys.exit(run(arguments or (), _hardware))


def _hardware(command: str, arguments: Sequence[str]) -> tuple[HardwareSpec, list[str]]:
    """What `nanogpt COMMAND` with these arguments should run on, and what to add to them so that every rank knows."""
    from nanogpt.cli.bench import bench
    from nanogpt.cli.train import train
    from nanogpt.cluster.at_hand import at_hand
    from nanogpt.cluster.job_step import RunArguments
    from nanogpt.errors import InputError

    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command()(train)
    reader, arguments = typer.main.get_command(bench if command == "bench" else alone), list(arguments)
    if isinstance(reader, typer.core.TyperGroup):  # the one of its commands that is named
        known = reader.commands.get(arguments.pop(0) if arguments else "")
        if known is None or not any(parameter.name == "recipe" for parameter in known.params):
            raise InputError("nanogpt launch --bench: takes step, profile or communication, and a RECIPE")
        reader = known
    with reader.make_context(f"nanogpt {command}", arguments) as context:
        said = context.params
    steps = said["steps"] if command == "train" else None  # those of `bench` mean something else
    given = RunArguments(said["recipe"], said["overrides"] or (), steps, resume=said.get("resume"), on=said["on"])
    settled = given.settled(at_hand(os.environ))
    return settled.spec().hardware, [] if settled.on == given.on else [f"--on={settled.on}"]


launch.command_class = _AsGiven  # type: ignore[attr-defined]
