"""Values from the environment, checked: directories with `~` and `$VARIABLE`, and numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from nanogpt.errors import InputError

MAX_PATH_BYTES, MAX_NAME_BYTES = 4096, 255  # Linux's PATH_MAX and NAME_MAX
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+)|(\{))", re.ASCII)


def expanded(text: str) -> str:
    """`text`, the name of a directory or file, with `~`, `~user`, `$VARIABLE` and `${VARIABLE}` replaced.

    Raises ValueError, with the reason, for an unknown user or variable and for text that cannot be a path.
    """
    found = os.path.expanduser(text)  # noqa: PTH111, a Path would lose a / at the end, and raise for unknown users
    if found.startswith("~"):
        user = found[1:].partition("/")[0]
        raise ValueError(f"there is no user {user!r}; a directory of that name here is ./{text}")
    found = _VARIABLE.sub(_value, found)
    if "\0" in found:
        raise ValueError("holds a NUL character, which no path can have")
    encoded = os.fsencode(found)
    if len(encoded) > MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        raise ValueError(f"is longer than {MAX_PATH_BYTES} bytes, or a part of it than {MAX_NAME_BYTES}")
    return found


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name is None:
        raise ValueError("has a ${ that is not the beginning of ${VARIABLE}")
    value = os.environ.get(name)
    if not value:
        state = "not set" if value is None else "empty"
        raise ValueError(f"the variable {name} is {state} here; export it, or write out the directory")
    return value


def expanded_path(text: str, place: str) -> Path:
    """`expanded` as a path. Raises `InputError`, beginning with `place`, a flag or a variable."""
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise InputError(f"{place}: found {text!r}: {error}") from None


def seen_inside(path: Path) -> str:
    """For a missing `path`: in a container, how to bind it, after a comma; elsewhere nothing."""
    if not (os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")):
        return ""
    return f" in the container. If it exists outside: export APPTAINER_BIND={path.absolute()}"


def path_of(variable: str) -> Path | None:
    """The path that an environment variable names; None if it is unset or empty. Raises `InputError`."""
    text = os.environ.get(variable)
    return expanded_path(text, variable) if text else None


def value_of(variable: str, environ: Mapping[str, str] | None = None) -> str:
    """The value of an environment variable. Raises `InputError` if it is unset or empty."""
    value = (os.environ if environ is None else environ).get(variable)
    if not value:
        raise InputError(f"{variable}: is not set; whoever starts this sets it: Slurm, or slurm/run.sh")
    return value


def number_of(
    variable: str,
    default: int | None = None,
    *,
    least: int = 0,
    most: int = 2**31 - 1,
    environ: Mapping[str, str] | None = None,
) -> int:
    """The whole number in a variable of `environ` (None: the process's); `default` if it is unset.

    Raises `InputError` for anything else, and if it is unset without a default.
    """
    text = (os.environ if environ is None else environ).get(variable, "").strip()
    if not text and default is not None:
        return default
    if re.fullmatch("[0-9]{1,10}", text, re.ASCII) and least <= int(text) <= most:
        return int(text)
    found = f"found {text!r}" if text else "is not set"
    raise InputError(f"{variable}: {found}, expected a whole number from {least} to {most}; unset or correct it")
