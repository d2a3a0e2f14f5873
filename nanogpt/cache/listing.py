"""The cache files of a directory: what they are for, and which may be deleted."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.cache.pack import SUFFIX, Header, Pack, PackError
from nanogpt.console import human_bytes, new_table
from nanogpt.errors import RunError

if TYPE_CHECKING:
    from rich.table import Table

HALF_WRITTEN_S = 3600.0  # a temporary file this old belongs to nobody any more


@dataclass(frozen=True)
class CacheFile:
    """A file; `problem` says why it cannot be used."""

    path: Path
    size: int
    used: float  # when it was written or last used, seconds since the epoch
    header: Header | None
    problem: str | None = None


def list_files(directory: Path) -> list[CacheFile]:
    """The cache files of the directory, most recently used first. Reads and checks each."""
    found = []
    for path in directory.glob(f"*{SUFFIX}"):
        try:
            status = path.stat()
        except OSError:  # gone meanwhile
            continue
        try:
            header, problem = Pack(path).header, None
        except PackError as error:
            header, problem = None, str(error)
        found.append(CacheFile(path, status.st_size, status.st_mtime, header, problem))
    return sorted(found, key=lambda file: file.used, reverse=True)


def files_table(files: list[CacheFile]) -> Table:
    """The files as a table."""
    columns = ("file", "size", "last used", "recipe", "device", "torch", "contents")
    table = new_table(*columns, wrap=("file", "recipe", "device", "contents"), spare=("torch", "recipe"))
    for file in files:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used))
        if file.header is None:
            table.add_row(file.path.name, human_bytes(file.size), used, "", "", "", f"not usable: {file.problem}")
            continue
        key = file.header.key
        contents = ", ".join(f"{count} {name}" for name, count in file.header.contents.items() if count)
        device, torch = str(key["device"][0]), str(key["torch"][0])
        table.add_row(file.path.name, human_bytes(file.size), used, file.header.recipe, device, torch, contents)
    return table


def files_data(files: list[CacheFile]) -> list[dict[str, Any]]:
    """The files as data that JSON can hold; `problem` says why one cannot be used."""
    return [
        {
            "file": str(file.path),
            "bytes": file.size,
            "used": file.used,
            "recipe": None if file.header is None else file.header.recipe,
            "key": None if file.header is None else file.header.key,
            "contents": None if file.header is None else file.header.contents,
            "problem": file.problem,
        }
        for file in files
    ]


def prune_files(directory: Path, *, keep: int) -> list[tuple[Path, int]]:
    """Delete all but the `keep` most recently used of the usable files, all others, and half-written ones an hour old.

    Returns the deleted files and their sizes. Raises `RunError` where one cannot be deleted.
    """
    files = list_files(directory)
    usable = [file for file in files if file.problem is None]
    doomed = [(file.path, file.size) for file in (*usable[keep:], *(file for file in files if file.problem))]
    for path in directory.glob(f".*{SUFFIX}.*.tmp"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if time.time() - status.st_mtime > HALF_WRITTEN_S:
                doomed.append((path, status.st_size))
    for path, _ in doomed:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{path}: cannot be deleted: {error.strerror}") from error
    return doomed
