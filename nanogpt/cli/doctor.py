"""`nanogpt doctor`: is everything here fit for a run?"""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    require_gpu: Annotated[bool, typer.Option("--gpu", help="Fail where there is no GPU.")] = False,
) -> None:
    """Check the versions, the GPU and its driver, FlashAttention, Triton, and train two steps; say what to do."""
    from nanogpt.cli.threads import wait_briefly
    from nanogpt.cluster.checkup import checkup

    wait_briefly()

    failed = False
    for check in checkup(require_gpu=require_gpu):
        typer.echo(check.line())
        failed = failed or check.status == "failed"
    raise typer.Exit(1 if failed else 0)
