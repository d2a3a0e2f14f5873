"""A checkpoint belongs to its run: it names the run's id and recipe, and no other run continues from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanogpt.console import say
from nanogpt.errors import InputError
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.record import read_record
from nanogpt.spec import RunSpec
from nanogpt.spec_differences import spec_differences

CHANGEABLE = ("data.directory", "hardware", "runtime", "checkpoint", "watchdog", "output")  # decide no result

Check = Callable[[Path, dict[str, Any]], None]


def deciding_differences(one: RunSpec, other: RunSpec) -> Iterator[tuple[str, Any, Any]]:
    """As `spec_differences`, for what decides a run's result."""
    for key, *values in spec_differences(one, other):
        if not any(f"{key}.".startswith(f"{changeable}.") for changeable in CHANGEABLE):
            yield key, *values


def owner(run: RunDirectory, spec: RunSpec) -> dict[str, Any]:
    """What a checkpoint says about its run, under `run`."""
    return {"id": run_id(run), "name": run.path.resolve().name, "spec": spec.model_dump_json()}


def run_id(run: RunDirectory) -> str | None:
    """The run's id; None if its record has none (an older run), or cannot be read."""
    try:
        return read_record(run.path).run_id
    except InputError:
        return None


def named_run(checkpoints: Path) -> str | None:
    """The run's id from its newest checkpoint, if its record has none; None: no checkpoint, or it names none."""
    from nanogpt.training.checkpoint import load_newest_checkpoint

    try:
        state = load_newest_checkpoint(checkpoints, every_byte=False)
    except InputError:  # loading says so
        return None
    named = (state or {}).get("run")
    return str(named["id"]) if isinstance(named, dict) and named.get("id") else None


def owner_check(run: RunDirectory, spec: RunSpec, *, tell: bool = True) -> Check:
    """A check for `load_newest_checkpoint`: raises `InputError` for a checkpoint of another run or recipe.

    One that names neither, from an older version, passes with a message (if `tell`).
    """
    own_id = run_id(run)

    def check(file: Path, state: dict[str, Any]) -> None:
        named = state.get("run")
        if not isinstance(named, dict):
            if tell:
                say(f"{file}: names no run, as an older version wrote it; treated as one of {run.path}")
            return
        way_out = f"Move it away to continue from an earlier one of {run.path}, or resume the run it belongs to"
        if own_id is not None and named.get("id") not in (None, own_id):
            raise InputError(
                f"{file}: is a checkpoint of the run {named.get('name')} (id {named['id']}), this run's id is {own_id}."
                f" {way_out}"
            )
        try:
            of_file = RunSpec.model_validate_json(str(named.get("spec")))
        except ValidationError:
            say(f"{file}: its recipe is from another version of this package, and is not compared")
            return
        found = [f"  {key}: {its} in the checkpoint, {ours} in the run" for key, its, ours in _few(of_file, spec)]
        if found:
            raise InputError("\n".join([f"{file}: is a checkpoint of another recipe. {way_out}:", *found]))

    return check


def _few(one: RunSpec, other: RunSpec, most: int = 8) -> list[tuple[str, Any, Any]]:
    return list(deciding_differences(one, other))[:most]
