"""The image and the shards on a node's own disk, copied once.

A copy that is there with the same size and time of change is taken as identical, as rsync does. Copies appear under
their names only when whole; jobs of one user that start on a node at once wait for one another.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from nanogpt.console import human_bytes, say
from nanogpt.errors import InputError, RunError


def stage_directory(stage: Path) -> Path:
    """The user's own directory in `stage`."""
    return stage / f"nanogpt-{getpass.getuser()}"


def staged_image(stage: Path, image: Path) -> Path:
    """Where the image's copy is to be."""
    return stage_directory(stage) / _tag(image.parent) / image.name


def staged_data(stage: Path, data: Path) -> Path:
    """Where the copies of the shards are to be."""
    return stage_directory(stage) / _tag(data) / "shards"


def _tag(path: Path) -> str:
    """Directories of other contents get other copies."""
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]


def stage_files(files: Sequence[Path], directory: Path) -> int:
    """Make `directory` hold copies of `files`; returns the bytes copied.

    Raises:
        InputError: the directory cannot be made.
        RunError: too little space, or a copy failed.
    """
    from filelock import FileLock

    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(
            f"NANOGPT_STAGE: {directory} cannot be made: {error.strerror}. Name a directory on the node's own disk that"
            " you may write to, such as /tmp, or unset NANOGPT_STAGE"
        ) from error
    copied = 0
    try:
        with FileLock(directory / ".lock"):
            todo = [file for file in files if not _identical(file, directory / file.name)]
            needed, free = sum(file.stat().st_size for file in todo), shutil.disk_usage(directory).free
            if needed > free:
                raise RunError(
                    f"NANOGPT_STAGE: {directory} has {human_bytes(free)} free, the copies need {human_bytes(needed)}."
                    " Name a larger disk, or unset NANOGPT_STAGE"
                )
            for file in todo:
                copied += _copy(file, directory / file.name)
    except OSError as error:
        raise RunError(f"NANOGPT_STAGE: {directory}: copying failed: {error}. Unset NANOGPT_STAGE") from error
    return copied


def _identical(source: Path, copy: Path) -> bool:
    try:
        one, other = source.stat(), copy.stat()
    except FileNotFoundError:
        return False
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _copy(source: Path, target: Path) -> int:
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(source, partial)
        shutil.copystat(source, partial)
        partial.replace(target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return target.stat().st_size


def stage(stage: Path, *, image: Path | None, shards: Sequence[Path], manifests: Sequence[Path] = ()) -> None:
    """Copy image and shards to this node's disk below `stage`, and say how long that took.

    Raises:
        InputError: `stage` cannot be written to.
        RunError: too little space there, or a copy failed.
    """
    parts = [] if image is None else [("image", [image], staged_image(stage, image).parent)]
    if shards:
        parts.append(("shards", [*shards, *manifests], staged_data(stage, shards[0].parent)))
    for what, files, directory in parts:
        began = time.monotonic()
        copied = stage_files(files, directory)
        seconds = time.monotonic() - began
        if copied:
            rate = f", {human_bytes(copied / max(seconds, 1e-3))}/s"
            say(f"staged {what}: {human_bytes(copied)} to {directory} in {seconds:.1f} s{rate}")
        else:
            say(f"staged {what}: there already, identical: {directory} ({seconds:.1f} s)")
