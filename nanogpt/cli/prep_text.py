"""`prep-text`, also `nanogpt prep-text`: own text to token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nanogpt.cli.entry import click_command, run_command


def prep_text(
    directory: Annotated[Path, typer.Option("--dir", help="Where to; made if missing.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...",
            help="Folders, and files: text (.txt, .md, source code), .jsonl, .jsonl.gz, .jsonl.zst, .parquet.",
        ),
    ] = None,
    embedded: Annotated[bool, typer.Option("--embedded", help="Also the prose that ships with the package.")] = False,
    val_tokens: Annotated[
        int | None,
        typer.Option(
            "--val-tokens", min=1, help="Validation tokens, at least.", show_default="a tenth, at most 10,485,761"
        ),
    ] = None,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", min=1, help="Tokens of a training shard, at most.")
    ] = 100_000_000,
    document_tokens: Annotated[
        int | None,
        typer.Option(
            "--document-tokens",
            min=2,
            help="Cut longer documents into several of at most so many tokens; training uses 2,048 of each.",
            show_default="whole documents",
        ),
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            "--min-tokens", min=2, help="Leave out shorter documents, after that cut.", show_default="all are kept"
        ),
    ] = None,
    unique: Annotated[bool, typer.Option("--unique", help="Leave out copies of a text.")] = False,
    shuffle: Annotated[
        bool,
        typer.Option("--shuffle", help="Documents in the order of a hash of their text, not folder by folder."),
    ] = False,
    field: Annotated[str, typer.Option("--field", help="Field or column of a record that holds its text.")] = "text",
    suffix: Annotated[
        list[str] | None, typer.Option("--suffix", help="A further suffix of text files, such as .log; repeatable.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes.", show_default="cores, fewer for little text")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the shards in --dir, all of them.")] = False,
) -> None:
    """Tokenize own text into validation and training shards.

    A text file is a document, and so is each record of JSON lines and Parquet. Folders are walked; what is hidden,
    binary, empty or not UTF-8 is left out and counted. Validation takes whole documents by a hash of their text, so the
    same input gives the same shards everywhere. text.json, beside the shards, says what they hold.
    """
    from nanogpt.data import text

    inputs: list[str | Path] = [*(paths or []), *([text.embedded_corpus()] if embedded else [])]
    summary = text.prepare_text(
        inputs,
        directory,
        val_tokens=val_tokens,
        shard_tokens=shard_tokens,
        document_tokens=document_tokens,
        min_tokens=min_tokens,
        unique=unique,
        shuffle=shuffle,
        field=field,
        suffixes=suffix or (),
        workers=workers,
        force=force,
    )
    print(text.table(summary), flush=True)


def text_main() -> NoReturn:
    """The console script `prep-text`."""
    run_command("prep-text", lambda: click_command(prep_text, "prep-text")(prog_name="prep-text"))
