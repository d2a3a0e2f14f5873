"""Opening only regular files: a pipe, socket or device in their place would keep the reader waiting."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError):
    """It is not a regular file; `strerror` says what it is."""


def open_regular(path: Path | str) -> BufferedReader:
    """The file at `path`, for reading bytes. Never waits for a writer.

    Raises:
        OSError: it cannot be opened; `NotRegularError` if it is not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise _not_regular(path, Path(path).stat().st_mode) from error
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise _not_regular(path, mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str) -> bytes:
    """The whole file. Raises as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_json(path: Path | str) -> Any:
    """The contents of a JSON file, all numbers finite. Raises OSError as `open_regular` does, else ValueError."""
    try:
        return json.loads(read_regular(path), parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def last_line(text: str) -> str:
    """The last line that is not blank; empty if there is none."""
    return (text.strip().splitlines() or [""])[-1]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number in JSON")
    return value


def _not_regular(path: Path | str, mode: int) -> NotRegularError:
    kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    return NotRegularError(code, f"is {kind}, expected a file", os.fspath(path))
