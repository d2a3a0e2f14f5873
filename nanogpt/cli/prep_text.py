"""`prep-text`, also `nanogpt prep-text`: turn your own text into token shards."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from nanogpt.cli.entry import click_command, run_command
from nanogpt.errors import NanogptError


def prep_text(
    directory: Annotated[Path, typer.Option("--dir", help="Directory for the shards; made if missing.")],
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...",
            help="Folders, and files: text (.txt, .md, source code), .jsonl, .ndjson and .json, also with .gz, .zst,"
            " .xz or .bz2, and .parquet.",
        ),
    ] = None,
    embedded: Annotated[bool, typer.Option("--embedded", help="Add the prose that ships with the package.")] = False,
    val_tokens: Annotated[
        int | None,
        typer.Option(
            "--val-tokens",
            min=1,
            help="At least this many validation tokens.",
            show_default="a tenth, at most 10,485,761",
        ),
    ] = None,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", min=1, help="At most this many tokens per training shard.")
    ] = 100_000_000,
    document_tokens: Annotated[
        int | None,
        typer.Option(
            "--document-tokens",
            min=2,
            help="Cut longer documents into several of at most N tokens; training uses 2,048 of each.",
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
        typer.Option("--shuffle", help="Order documents by a hash of their text, not folder by folder."),
    ] = False,
    split_by: Annotated[
        str,
        typer.Option(
            "--split-by",
            metavar="WHAT",
            help="What goes to one side of the split as a whole: document, with its copies; source, a package of an"
            " installed Python or else a PATH's top folder; directory:DEPTH, the first DEPTH folders below PATH;"
            " field:NAME, what that field or column of a record says.",
        ),
    ] = "document",
    near_duplicates: Annotated[
        Literal["count", "drop"] | None,
        typer.Option(
            "--near-duplicates",
            metavar="count|drop",
            help="Find documents that share four fifths of their runs of five tokens: count them, or leave out all but"
            " the first. Needs the package rensa.",
        ),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Field or column of a record that holds its text.")] = "text",
    suffix: Annotated[
        list[str] | None, typer.Option("--suffix", help="A further suffix for text files, such as .log. Repeatable.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes.", show_default="cores, fewer for little text")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace all shards in --dir.")] = False,
    keep_damaged: Annotated[
        bool,
        typer.Option(
            "--keep-damaged",
            help="Make shards of what can be read, even if a file named here is damaged; all good records before a"
            " damaged place are used.",
        ),
    ] = False,
) -> None:
    """Tokenize your own text into validation and training shards.

    A text file is a document, and so is each record of JSON and Parquet; a .json file holds an array of objects, one
    object, or a record per line. Folders are walked; what is hidden, binary, empty, damaged or not UTF-8 there is left
    out and counted. If a file that you name cannot be read to its end, all reasons are reported, no shards are
    written, and the exit code is 1; --keep-damaged makes shards of the rest. Validation takes whole documents by a hash
    of their text, or whole sources by a hash of their names, so the same input gives the same shards everywhere.
    text.json, beside the shards, describes them.
    """
    from nanogpt.console import print_table
    from nanogpt.data import text

    inputs: list[str | Path] = [*(paths or []), *([text.embedded_corpus()] if embedded else [])]
    with _cleaning_up():
        summary = text.prepare_text(
            inputs,
            directory,
            val_tokens=val_tokens,
            shard_tokens=shard_tokens,
            document_tokens=document_tokens,
            min_tokens=min_tokens,
            unique=unique,
            shuffle=shuffle,
            split_by=split_by,
            near_duplicates=near_duplicates,
            field=field,
            suffixes=suffix or (),
            workers=workers,
            force=force,
            keep_damaged=keep_damaged,
        )
    print_table(*text.summary_tables(summary))


class _Stopped(NanogptError):
    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: nothing is written; run the same command again")
        self.exit_code = 128 + number


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """Let a signal end the work as an error does, so that nothing half done is left; a second one ends it at once."""
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before: dict[int, object] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def stop(number: int, _frame: object) -> NoReturn:
        restore()
        raise _Stopped(number)

    before.update((number, signal.signal(number, stop)) for number in numbers)
    try:
        yield
    finally:
        restore()


def text_main() -> NoReturn:
    """The console script `prep-text`."""
    run_command("prep-text", lambda: click_command(prep_text, "prep-text")(prog_name="prep-text"))
