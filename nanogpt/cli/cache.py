"""The files of compiled code that runs leave for later runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

cache = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=__doc__)

DirectoryArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="DIR", help="Where the files are.", show_default="NANOGPT_CACHE, else cache beside the runs"
    ),
]


def _directory(directory: Path | None) -> Path:
    from nanogpt.cache.compile_cache import VARIABLE, cache_directory
    from nanogpt.errors import InputError

    found = directory or cache_directory()
    if found is None:
        raise InputError(f"{VARIABLE}: is off; name the directory of the cache files")
    return found


@cache.command("ls", short_help="List the files, newest first.")
def ls(
    directory: DirectoryArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """List the files, newest first: size, age, what they are for, and whether they can be used."""
    import json

    from nanogpt.cache.listing import files_data, files_table, list_files
    from nanogpt.console import print_table, say

    place = _directory(directory)
    files = list_files(place)
    if as_json:
        typer.echo(json.dumps(files_data(files), indent=2))
    elif files:
        print_table(files_table(files))
    else:
        say(f"{place}: no cache files")


@cache.command("prune", short_help="Delete old and damaged files.")
def prune(
    directory: DirectoryArgument = None,
    keep: Annotated[int, typer.Option(help="Files to keep: the most recently used or written.", min=0)] = 4,
) -> None:
    """Delete old files, damaged files, and what killed jobs left half-written."""
    from nanogpt.cache.listing import prune_files
    from nanogpt.console import human_bytes

    removed = prune_files(_directory(directory), keep=keep)
    for path, size in removed:
        typer.echo(f"{path.name}: deleted, {human_bytes(size)}")
    typer.echo(f"{len(removed)} files deleted, {human_bytes(sum(size for _, size in removed))}")
