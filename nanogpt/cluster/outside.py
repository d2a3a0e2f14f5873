"""Slurm's commands, called from inside the image, which lacks them.

`slurm/nanogpt.sh`, which starts `nanogpt` in the image, waits outside at a FIFO in the directory NANOGPT_RELAY,
runs the requested commands, one at a time, and leaves their output there. Without the relay this machine's own commands
are run.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from nanogpt.errors import RunError

RELAY = "NANOGPT_RELAY"
NOT_FOUND = 127  # a shell's code for a missing command
_RELAY_PATIENCE_S = 10.0


class Answer(NamedTuple):
    """A command's result: exit code (127: no such command), standard output, standard error."""

    code: int
    out: str
    err: str


def ask(*command: str, timeout_s: float = 60.0) -> Answer:
    """Run one of Slurm's commands (or getent) outside the image, and wait for it.

    Raises:
        RunError: the relay is gone, or the command took longer than `timeout_s` (without a relay).
    """
    relay = os.environ.get(RELAY)
    if relay:
        return _through(Path(relay), command)
    if shutil.which(command[0]) is None:
        return Answer(NOT_FOUND, "", f"{command[0]}: not found on this machine")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(
            f"{' '.join(command)}: no answer in {timeout_s:.0f} s; is slurmctld up? (scontrol ping)"
        ) from error
    return Answer(done.returncode, done.stdout, done.stderr)


def ask_or_fail(*command: str) -> str:
    """The output of a command that must succeed. Raises `RunError` with its message."""
    answer = ask(*command)
    if answer.code == NOT_FOUND:
        raise RunError(
            f"{command[0]}: not found. The image has no Slurm: run this with slurm/nanogpt.sh on a machine that has it"
        )
    if answer.code:
        raise RunError(f"{' '.join(command)}: {answer.err.strip() or f'exit code {answer.code}'}")
    return answer.out


def _through(relay: Path, command: tuple[str, ...]) -> Answer:
    with os.fdopen(_writer(relay / "ask"), "wb") as file:
        file.write(b"".join(os.fsencode(argument) + b"\0" for argument in command))
    code = (relay / "answer").read_text(encoding="utf-8").strip()  # waits until the command has ended
    if not code.isdecimal():
        raise RunError(f"{relay}: the relay of slurm/nanogpt.sh ended while {command[0]} was running; start it again")
    out, err = ((relay / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    return Answer(int(code), out, err)


def _writer(fifo: Path) -> int:
    """The FIFO, opened for writing once there is a reader."""
    until = time.monotonic() + _RELAY_PATIENCE_S
    while True:
        try:
            descriptor = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > until:
                raise RunError(f"{fifo}: nobody answers ({error.strerror}); run this with slurm/nanogpt.sh") from error
            time.sleep(0.01)
            continue
        os.set_blocking(descriptor, True)
        return descriptor
