"""`nanogpt plot`: losses of runs as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are drawn together.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The picture, .png or .svg.",
            show_default="loss.png in the run's directory; in this one for several runs",
        ),
    ] = None,
) -> None:
    """Draw validation and training loss of runs, finished or not, against steps and against training time."""
    from nanogpt.runs.directory import RunDirectory
    from nanogpt.runs.metrics import read_run
    from nanogpt.runs.plot import Reference, plot_loss

    paths = list({path.resolve(): path for path in runs}.values())
    names = [path.resolve().name for path in paths]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    losses = {label: read_run(path) for label, path in zip(labels, paths, strict=True)}
    targets = {RunDirectory.open(path).spec().evaluation.target_loss for path in paths} - {None}
    if out is None:
        out = (paths[0] if len(paths) == 1 else Path()) / "loss.png"
    plot_loss(losses, out, [Reference(target, "target") for target in sorted(filter(None, targets))])
    typer.echo(str(out))
