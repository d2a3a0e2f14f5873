"""`nanogpt doctor`: check that everything here is fit for a run."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    require_gpu: Annotated[bool, typer.Option("--gpu", help="Fail if there is no GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
) -> None:
    """Check versions, GPU, driver, FlashAttention and Triton, train two steps, and say what to do about problems.

    Exit code 1: a check failed.
    """
    import json

    from nanogpt.cluster.checkup import checkup
    from nanogpt.threads import wait_briefly

    wait_briefly()

    checks = []
    for check in checkup(require_gpu=require_gpu):
        checks.append(check)
        if not as_json:
            typer.echo(check.line())
    if as_json:
        typer.echo(json.dumps([check._asdict() for check in checks], indent=2))
    raise typer.Exit(1 if any(check.status == "failed" for check in checks) else 0)
