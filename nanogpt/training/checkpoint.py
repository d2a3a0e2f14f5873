"""Checkpoints: a run's full state in one file that exists completely or not at all.

A checkpoint is independent of the world size. It is written under a temporary name, flushed to disk and then renamed,
so a crash in between leaves the previous one untouched.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from nanogpt.console import say
from nanogpt.errors import InputError, RunError
from nanogpt.files import open_regular

FORMAT = 2
_READ = (1, FORMAT)  # format 1 had the mean of the ranks' pending gradients
_DAMAGE = (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.PickleError, zlib.error, zipfile.BadZipFile)
_NAME = re.compile(r"^step-(\d{6,})\.pt$")


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint after `step` steps."""
    return f"step-{step:06d}.pt"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match.group(1)), file) for file in directory.glob("step-*.pt") if (match := _NAME.match(file.name))]
    return [file for _, file in sorted(found)]


def import_ahead_of_saving() -> None:
    """Write an empty checkpoint to memory, so that the first real one need not import anything.

    If a signal asks for that one, the container's image may be gone: see `nanogpt.launch.page_cache`.
    """
    torch.save({"format": FORMAT, "step": 0, "model": {"weight": torch.zeros(1)}}, io.BytesIO())


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint after `step` steps, then delete all but the newest `keep`.

    Raises `RunError` if it cannot be written; earlier checkpoints stay.
    """
    path = directory / checkpoint_name(step)
    partial = directory / f".{path.name}.{os.getpid()}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".step-*.partial"):
            stale.unlink()
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of some
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else error
        raise RunError(
            f"{path}: the checkpoint could not be written: {reason}. Earlier checkpoints are intact: fix this, then"
            " continue with --resume"
        ) from error
    for old in list_checkpoints(directory)[:-keep]:
        with contextlib.suppress(OSError):  # the next one tries again
            old.unlink()
    return path


def extra_state(model: nn.Module) -> dict[str, Any]:
    """What the model's modules keep besides tensors: small plain data, which may differ by rank."""
    return {name: value for name, value in model.state_dict().items() if name.endswith(_EXTRA_STATE_KEY_SUFFIX)}


def model_state_of_rank(state: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """The model's part of a checkpoint, with this rank's own `extra_state` if the number of ranks is the same."""
    by_rank = state.get("extra_state_by_rank", ())
    return {**state["model"], **(by_rank[rank] if len(by_rank) == size else {})}


def load_newest_checkpoint(
    directory: Path, check: Callable[[Path, dict[str, Any]], None] | None = None, *, every_byte: bool = True
) -> dict[str, Any] | None:
    """The newest readable checkpoint, on the CPU; None if there is none.

    A damaged one is reported and skipped.

    Args:
        directory: of the run's checkpoints.
        check: raises for one that must not be used (`nanogpt.training.ownership`).
        every_byte: compare all checksums; otherwise the tensors are not yet read.

    Raises:
        InputError: none of them can be read, or the newest is of another version, or of a step other than its
            name's.
    """
    files = list_checkpoints(directory)
    for file in reversed(files):
        try:
            with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
                damaged = archive.testzip() if every_byte else None  # torch ignores the checksums it writes
            if damaged:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(state, dict) or not isinstance(state.get("step"), int):
                raise ValueError("has no step")
        except _DAMAGE as error:
            say(f"{file}: not a readable checkpoint ({error}); trying the previous one")
            continue
        if state.get("format") not in _READ:
            raise InputError(f"{file}: checkpoint format {state.get('format')}, this version reads format {FORMAT}")
        if file.name != checkpoint_name(state["step"]):
            raise InputError(
                f"{file}: is the checkpoint after step {state['step']}, but its name says another. Rename it to"
                f" {checkpoint_name(state['step'])}, or move it away"
            )
        if check is not None:
            check(file, state)
        return state
    if files:
        raise InputError(f"{directory}: none of its {len(files)} checkpoints can be read")
    return None


@contextlib.contextmanager
def taken_over(directory: Path) -> Iterator[None]:
    """Inside, the parts of a checkpoint are loaded into what was built from the run's spec.

    Raises `InputError` if one does not fit: the checkpoint, or what was built, is another run's.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, dist.DistError):  # a rank was lost, or the network
            raise
        what = f"misses {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{directory}: its newest checkpoint does not fit the run's spec.yaml and this version of the package:"
            f" {what}. If it is another run's, or damaged, remove it: the one before is used then, or the start"
        ) from error
