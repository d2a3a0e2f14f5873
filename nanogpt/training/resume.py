"""What a resumed run may change: how and where it computes and writes, but nothing that decides its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt.errors import InputError
from nanogpt.recipe import load_recipe
from nanogpt.runs.data_files import shards_directory
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.record import process_lives, read_record
from nanogpt.spec import RunSpec
from nanogpt.spec_differences import spec_differences
from nanogpt.training.ownership import CHANGEABLE, deciding_differences, owner_check


def resumed_spec(
    run: RunDirectory,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    *,
    on: str | None = None,
) -> RunSpec:
    """The spec to continue with: the run's own on hardware `on`, with `overrides`, which may touch CHANGEABLE only.

    `recipe`, if given, must resolve to the same spec with the same hardware, overrides and steps.

    Raises:
        InputError: it does not, or an override would make it another run; the message has a line per difference.
    """
    spec = load_recipe(run.spec_path.absolute(), overrides, steps, on=on)
    if recipe is not None:
        again = load_recipe(recipe, overrides, steps, on=on, fill=lambda _: (spec.hardware.model_dump(), str(run.path)))
        differences = list(spec_differences(spec, again))
        _refuse(run, differences, recipe, "resume without a recipe, or with the recipe and the --set it started with")
    differences = list(deciding_differences(run.spec(), spec))
    _refuse(run, differences, "the command line", f"a resumed run may change {', '.join(CHANGEABLE)}; start a new one")
    return spec


def resumed_data_directory(run: RunDirectory, spec: RunSpec) -> Path:
    """Where the run read its shards according to its record, if that exists; else where a new run would look."""
    try:
        return shards_directory(spec, read_record(run.path).data)
    except InputError:  # no record, or a damaged one
        return shards_directory(spec)


def check_not_running(run: RunDirectory) -> None:
    """Refuse a run whose process is still alive, as far as visible from here. Raises `InputError`."""
    try:
        record = read_record(run.path)
    except InputError:  # missing or damaged: the checkpoints decide
        return
    process = record.starts[-1].process
    if record.state == "running" and process_lives(process):
        raise InputError(
            f"{run.path}: process {process.pid} on {process.host} is still writing it, and two would corrupt its files."
            f" End that one first (kill {process.pid}), or start a new run"
        )


def check_checkpoints(run: RunDirectory, spec: RunSpec) -> None:
    """Before anything is built, refuse a newest checkpoint that is not the run's. Raises `InputError`."""
    from nanogpt.training.checkpoint import load_newest_checkpoint

    load_newest_checkpoint(run.checkpoint_directory, owner_check(run, spec, tell=False), every_byte=False)


def _refuse(run: RunDirectory, differences: Sequence[tuple[Any, ...]], source: str, way_out: str) -> None:
    if differences:
        lines = [f"  {key}: {there} in the run, {here} by {source}" for key, there, here in differences]
        raise InputError("\n".join([f"{run.spec_path}: cannot continue as another run; {way_out}:", *lines]))
