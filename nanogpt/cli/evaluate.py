"""`nanogpt evaluate`: the validation loss of a run's checkpoint, by document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanogpt.cli.threads import wait_briefly


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.", show_default=False)],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER_RUN", help="Another's, to compare with.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Directory of the validation shards.",
            show_default="where RUN read them, else as for nanogpt train",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="N", help="Validation tokens to evaluate.", show_default="evaluation.tokens of RUN"
        ),
    ] = None,
    documents: Annotated[int, typer.Option("--documents", min=0, metavar="K", help="Documents to list.")] = 10,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="cpu|cuda", help="Where to compute.", show_default="a GPU if there is one"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write all documents to this file, as JSON.")
    ] = None,
) -> None:
    """Compute the validation loss of RUN's newest checkpoint anew, and list the documents that weigh most on it.

    With OTHER_RUN, both are evaluated on the same tokens, and the documents that make the difference are listed.

    Standard errors are over documents of s nats and n tokens: with D of them and R = sum(s) / sum(n), the mean,
    sqrt(D / (D - 1) * sum((s - R n)^2)) / sum(n). For a difference, s is the difference of a document's losses.

    A document that the edge of a validation micro-batch cuts counts as two.
    """
    wait_briefly()
    import json

    from nanogpt.console import say
    from nanogpt.errors import InputError, RunError
    from nanogpt.runs.directory import write_whole
    from nanogpt.training.evaluation import as_json, as_lines, evaluate_runs

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out: {out}: expected a file's name in a directory that is there")
    directories = [run] if other is None else [run, other]
    evaluation = evaluate_runs(directories, data_directory=data, tokens=tokens, device=device)
    if out is not None:
        try:
            write_whole(out, json.dumps(as_json(evaluation), indent=1) + "\n")
        except OSError as error:
            raise RunError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from error
        say(f"All documents: {out}")
    for line in as_lines(evaluation, documents):
        typer.echo(line)
