"""`nanogpt evaluate`: the validation loss of a run's checkpoint, by document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nanogpt.threads import wait_briefly


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.", show_default=False)],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="OTHER_RUN", help="Another run's directory, to compare with.", show_default=False),
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
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write all documents, or answers, to this file, as JSON."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables, with all documents.")] = False,
    task: Annotated[
        str | None, typer.Option("--task", metavar="hellaswag", help="Answer its questions instead.")
    ] = None,
    items: Annotated[
        Path | None, typer.Option("--items", metavar="FILE", help="With --task: its questions, as JSON lines.")
    ] = None,
    no_bos: Annotated[
        bool,
        typer.Option("--no-bos", help="With --task: no <|endoftext|> before a question, as in lm-eval for GPT-2."),
    ] = False,
) -> None:
    """Compute the validation loss of RUN's newest checkpoint again and list the documents that weigh most on it.

    With OTHER_RUN, both are evaluated on the same tokens, and the documents that make the difference are listed.

    With --task, print the share of questions that RUN answers correctly, by EleutherAI's lm-evaluation-harness rules.

    Standard errors are over documents of s nats and n tokens: with D of them and R = sum(s) / sum(n), the mean,
    sqrt(D / (D - 1) * sum((s - R n)^2)) / sum(n). For a difference, s is the difference of a document's losses.

    A document that is cut by the edge of a validation micro-batch counts as two.
    """
    wait_briefly()
    from nanogpt.errors import InputError
    from nanogpt.training.evaluation import as_json as evaluation_data
    from nanogpt.training.evaluation import as_lines, evaluate_runs

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out: {out}: expected a file's name in a directory that exists")
    directories = [run] if other is None else [run, other]
    if task is not None:
        if data is not None or tokens is not None:
            raise InputError("--data, --tokens: are for validation losses; --task reads --items")
        report, lines = _answers(directories, task, items, bos=not no_bos, device=device)
        _write(out, report, "answers")
        _show(report, lines, as_json)
        return
    if items is not None or no_bos:
        raise InputError("--items, --no-bos: are for --task, which is not given")
    evaluation = evaluate_runs(directories, data_directory=data, tokens=tokens, device=device)
    report = evaluation_data(evaluation)
    _write(out, report, "documents")
    _show(report, as_lines(evaluation, documents), as_json)


def _answers(
    directories: list[Path], task: str, items: Path | None, *, bos: bool, device: str | None
) -> tuple[dict[str, Any], list[str]]:
    """What goes to --out, and what is printed."""
    from nanogpt.errors import InputError
    from nanogpt.training.multiple_choice import TASKS, answer_items, as_json, as_lines, read_hellaswag

    if task not in TASKS:
        raise InputError(f"--task: found {task!r}, expected {' or '.join(TASKS)}")
    if items is None:
        raise InputError(f"--items: is missing; name the file with the items of {task}, one line of JSON each")
    questions = read_hellaswag(items)
    answers = answer_items(directories, questions, bos=bos, device=device)
    return as_json(answers, questions, task), as_lines(answers, questions, task)


def _show(report: dict[str, Any], lines: list[str], as_json: bool) -> None:
    import json

    from nanogpt.console import print_report

    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        print_report(lines)


def _write(out: Path | None, report: dict[str, Any], what: str) -> None:
    import json

    from nanogpt.console import say
    from nanogpt.errors import RunError
    from nanogpt.runs.directory import write_whole

    if out is None:
        return
    try:
        write_whole(out, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from error
    say(f"All {what}: {out}")
