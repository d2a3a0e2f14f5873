"""`nanogpt launch`: starts the ranks of `nanogpt train`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
import typer.core


class _AsGiven(typer.core.TyperCommand):
    """Leaves every argument but a sole --help to the function."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args in (["--help"], ["-h"], []):
            return super().parse_args(ctx, ["--help"])
        ctx.params = {"arguments": args}
        return []


def launch(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTIONS BELOW] [--] RECIPE [TRAIN OPTIONS]", show_default=False),
    ] = None,
) -> None:
    """Train on several GPUs or nodes: options named as torchrun's, then the arguments of `nanogpt train`.

    nanogpt launch --standalone --nproc-per-node 8 8xh100

    nanogpt launch --nnodes 2 --nproc-per-node 4 --rdzv-endpoint NODE:29500 --rdzv-id JOB RECIPE, on each node

    nanogpt launch --standalone --nproc-per-node 8 -- --resume RUN_DIR

    --nproc-per-node N: processes on this node; gpu: as many as it has GPUs. --standalone: one node (the default).

    --nnodes N: nodes. --rdzv-endpoint HOST:PORT (or --master-addr, --master-port): where they meet, the first node's
    address in the cluster's network. --rdzv-id ID: keeps runs apart. --node-rank I: this node's number; without it
    they are numbered as they come. --local-addr ADDRESS: where the first node listens, if not at HOST.
    --rdzv-conf join_timeout=SECONDS (600), is_host=true|false.

    SIGTERM and SIGUSR1 end the run after its step, with a checkpoint and exit code 75. --grace SECONDS: how long that
    may take (600). --bench: the arguments are those of `nanogpt bench`, as in --bench profile 4xh100.
    """
    from nanogpt.launch.launcher import launch as run

    sys.exit(run(arguments or ()))


launch.command_class = _AsGiven  # type: ignore[attr-defined]
