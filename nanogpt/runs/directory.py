"""A run's directory: log.txt, metrics.jsonl, spec.yaml, record.json and checkpoints/.

- It appears complete, with spec and record, as `NAME-YYYYmmdd-HHMMSS`; two runs in one second get two directories.
- spec.yaml, the resolved spec, makes a directory a run.
- Every line is on its way to the disk when the call returns, so a killed run has written all it knew. A half-written
  last line, from a kill or a full disk, is repaired when the run continues.

One process of a run writes (rank 0); any number may read. No torch is needed here.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nanogpt.environment import path_of
from nanogpt.errors import InputError, NanogptError, RunError
from nanogpt.recipe import dump_spec, load_recipe
from nanogpt.spec import RunSpec

LOG_NAME = "log.txt"
METRICS_NAME = "metrics.jsonl"
SPEC_NAME = "spec.yaml"
RECORD_NAME = "record.json"
CHECKPOINTS_NAME = "checkpoints"
_NEW_PREFIX = ".new-"

# float32 values keep all their bits through nine digits.
FLOAT_DIGITS = 9


class RunDirectory:
    """One run's directory. Files are opened at the first line written; reading leaves a directory untouched.

    Make one with `create` or `open`. Usable as a context manager, which closes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._log = _Lines(self.log_path)
        self._metrics = _Lines(self.metrics_path)

    @property
    def log_path(self) -> Path:
        """The log for people."""
        return self.path / LOG_NAME

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line: see `nanogpt.runs.metrics`."""
        return self.path / METRICS_NAME

    @property
    def spec_path(self) -> Path:
        """The resolved spec, itself a recipe."""
        return self.path / SPEC_NAME

    @property
    def checkpoint_directory(self) -> Path:
        """Where checkpoints go; created with the first."""
        return self.path / CHECKPOINTS_NAME

    @classmethod
    def create(cls, parent: Path, spec: RunSpec, *, record: str | None = None) -> RunDirectory:
        """Make `parent/NAME-YYYYmmdd-HHMMSS` (local time; `-2`, `-3`, ... if taken) with spec.yaml in it.

        `record` is the text of record.json. The directory gets its name when both are complete: a process killed
        before that leaves nothing that looks like a run, only a `.new-*` that is never listed.

        Raises:
            InputError: `parent` cannot be created or written to.
            RunError: the disk is full, or failed.
        """
        stem = f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        new = parent / f"{_NEW_PREFIX}{stem}-{secrets.token_hex(4)}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            if record is not None:
                write_whole(new / RECORD_NAME, record)
            write_whole(new / SPEC_NAME, dump_spec(spec))
            for count in itertools.count(1):
                path = parent / (stem if count == 1 else f"{stem}-{count}")
                if path.exists():
                    continue
                try:
                    return cls(new.rename(path))
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                        raise
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise _cannot_create(parent, error) from error
        raise AssertionError("unreachable")

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """The run directory at `path`, which exists.

        Raises:
            InputError: there is nothing, or no run; the message names runs found below.
        """
        path = Path(path)
        try:
            if is_run(path):
                return cls(path)
            if not path.exists():
                raise InputError(f"{path}: no such run directory; expected one that `nanogpt train` made")
            if not path.is_dir():
                raise InputError(f"{path}: is a file, expected a run directory (it has a {SPEC_NAME})")
            runs = sorted(
                (child for child in path.iterdir() if is_run(child) and not child.name.startswith(_NEW_PREFIX)),
                key=lambda run: (run / SPEC_NAME).stat().st_mtime,
            )
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if runs:
            several = f"it holds {len(runs)} runs, the newest is" if len(runs) > 1 else "it holds one run:"
            raise InputError(f"{path}: not a run directory (no {SPEC_NAME} in it); {several} {runs[-1]}")
        raise InputError(f"{path}: not a run directory: no {SPEC_NAME} in it")

    def spec(self) -> RunSpec:
        """The run's resolved spec. Raises `RecipeError`, an `InputError`, if spec.yaml is not valid."""
        return load_recipe(self.spec_path.absolute())

    def log(self, line: str) -> None:
        """Append `line` to log.txt. Raises `RunError` if it cannot be written."""
        self._log.append(line.removesuffix("\n") + "\n")

    def metric(self, record: Mapping[str, Any]) -> None:
        """Append `record` to metrics.jsonl as one line of valid JSON.

        Floats keep nine significant digits; NaN and infinities, which JSON lacks, become null. NumPy
        and torch scalars and paths are converted. Raises `RunError` if it cannot be written.
        """
        self._metrics.append(json.dumps(_plain(record), allow_nan=False, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the files. May be called again; a later line reopens them."""
        self._log.close()
        self._metrics.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def output_directory(spec: RunSpec) -> Path:
    """Where run directories are created: output.directory, else NANOGPT_RUNS, else `runs` here."""
    return Path(spec.output.directory) if spec.output.directory else path_of("NANOGPT_RUNS") or Path("runs")


def is_run(path: Path) -> bool:
    """Whether `path` is a run's directory."""
    return (path / SPEC_NAME).is_file()


class _Lines:
    """A text file that only grows, line by line, each in one unbuffered write."""

    def __init__(self, path: Path):
        self._path = path
        self._file: BinaryIO | None = None

    def append(self, line: str) -> None:
        data = line.encode("utf-8", errors="backslashreplace")
        try:
            if self._file is None:
                _drop_half_line(self._path)
                self._file = self._path.open("ab", buffering=0)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot be written: {error.strerror}. Free space or repair the file system, then resume"
                " the run from its last checkpoint"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _drop_half_line(path: Path) -> None:
    """Cut off what a kill or a full disk left after the last newline."""
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 4096)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
            if end == 0:
                file.truncate(0)


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.{FLOAT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"metric: {value!r} is a {type(value).__name__}, which JSON lacks")


def write_whole(path: Path, text: str) -> None:
    """Replace the file at `path` with `text`, atomically and crash-safe. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(out: Path) -> None:
    """Raise `InputError` if something other than an empty directory is at `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already exists; name another directory with --out")


@contextmanager
def whole_directory(out: Path, what: str) -> Iterator[Path]:
    """Create the directory `out` completely or not at all: yields one beside it to write to. what: for messages.

    Raises RunError if it cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        raise RunError(f"{out}: the {what} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(partial, ignore_errors=True)


def _cannot_create(parent: Path, error: OSError) -> NanogptError:
    way_out = "name another directory: nanogpt train --out DIR, nanogpt demo --dir DIR, or NANOGPT_RUNS=DIR"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return RunError(f"{parent}: no run directory can be created: {error.strerror}. Free space there, or {way_out}")
    reason = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
    return InputError(f"{parent}: no run directory can be created here: {reason}; {way_out}")
