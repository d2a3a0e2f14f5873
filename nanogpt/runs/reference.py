"""Reference curves: what a published run of the same recipe reached at each step, and whether this run is near it.

A recipe's `reference` holds published validation losses. They apply to a run on FineWeb's own shards whose
spec gives the published result; for any other run the comparison is off, and `why_off` says why.

The band around the first curve is five standard deviations of the loss from run to run. The curve is a single run,
and the difference of two runs spreads sqrt(2) times as far: five are three and a half of those, which
chance exceeds once in two thousand evaluations. An error in model, data or optimizer costs more, usually early on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.data.manifest import MANIFEST, REPOSITORY, known_sha256, read_manifest
from nanogpt.files import read_json
from nanogpt.recipe import load_recipe, shipped_recipes
from nanogpt.spec import ReferenceSpec, RunSpec
from nanogpt.spec_differences import spec_differences

BAND_SPREADS = 5
RESULT_KEYS = ("model", "optimizer", "training", "evaluation.tokens", "evaluation.micro_batch_tokens", "data.bos")
NOT_RESULT_KEYS = ("training.seed", "training.warmup")


@dataclass(frozen=True)
class Comparison:
    """A validation loss beside the reference's at the same step; losses in nats."""

    step: int
    loss: float
    reference: str  # the curve's name
    reference_loss: float
    band: float

    @property
    def difference(self) -> float:
        """Positive: above the reference."""
        return self.loss - self.reference_loss

    @property
    def inside(self) -> bool:
        """Within the band."""
        return abs(self.difference) <= self.band

    def lines(self) -> list[str]:
        """For the log, below the evaluation's line: the comparison, and a warning if the run has left the band."""
        text = (
            f"reference:{self.reference_loss:.4f} ({self.reference}) difference:{self.difference:+.4f}"
            f" band:+-{self.band:.4f}"
        )
        if self.inside:
            return [text]
        where = "above" if self.difference > 0 else "below"
        return [
            text,
            f"warning: {abs(self.difference):.2g} {where} {self.reference} at step {self.step}, outside the band of"
            f" {self.band:.2g}: stop and check",
        ]

    def fields(self) -> dict[str, Any]:
        """For the evaluation's metrics record."""
        return {"reference": self.reference, "reference_loss": self.reference_loss, "reference_band": self.band}


def compare_loss(reference: ReferenceSpec, step: int, loss: float) -> Comparison | None:
    """`loss` after `step` steps compared with the first curve; None at a step that the curve lacks."""
    curve = reference.curves[0]
    found = dict(curve.points).get(step)
    if found is None:
        return None
    return Comparison(step, loss, curve.name, found, BAND_SPREADS * spread_at(reference, step))


def spread_at(reference: ReferenceSpec, step: int) -> float:
    """Standard deviation of the loss after `step` steps from run to run, in nats."""
    known = sorted(reference.spread)
    for (before, low), (after, high) in itertools.pairwise(known):
        if before <= step <= after:
            return low + (high - low) * (step - before) / (after - before)
    return known[0][1] if step < known[0][0] else known[-1][1]


def why_off(spec: RunSpec, data_directory: Path) -> str | None:
    """Why a run of `spec` on the shards in `data_directory` has no reference; None: it has one."""
    if spec.reference is None:
        return "the recipe has none"
    differences = [key for key, _, _ in result_differences(load_shipped(spec.reference.recipe), spec)]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        return f"the run differs from {spec.reference.recipe} in {', '.join(differences[:3])}{more}"
    return why_not_fineweb(data_directory, spec)


def why_not_fineweb(directory: Path, spec: RunSpec) -> str | None:
    """Why the shards that `spec` reads in `directory` are not known to be FineWeb's; None: they are.

    The evidence is prep-fineweb's manifest, beside shards whose sha256 is the hub's. Lengths are compared with
    it; nothing is read.
    """
    path = directory / MANIFEST
    try:
        repository = read_json(path).get("repository")
    except (OSError, ValueError, AttributeError):
        return f"{path}: no manifest of downloaded shards"
    if repository != REPOSITORY:
        return f"{path}: shards of {repository}, not of {REPOSITORY}"
    entries = read_manifest(directory)
    for pattern in (spec.data.val_files, spec.data.train_files):
        files = sorted(directory.glob(pattern))
        if not files:
            return f"{directory}: no {pattern}"
        for file in files:
            entry = entries.get(file.name)
            if entry is None:
                return f"{file}: not in the manifest of downloaded shards"
            if known_sha256(file.name, entry) != entry.sha256:
                return f"{file}: {path} has sha256 {entry.sha256[:12]}, which is not the data set's"
            if file.stat().st_size != entry.bytes:
                return f"{file}: {file.stat().st_size} bytes, the hub's file has {entry.bytes}"
    return None


def load_shipped(recipe: str) -> RunSpec:
    """The shipped recipe of this name, whatever files of that name lie in the working directory."""
    return load_recipe(shipped_recipes() / f"{recipe}.yaml")


def result_differences(one: RunSpec, other: RunSpec) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in `one`, value in `other`) for everything that decides the loss, except by chance."""
    for key, *values in spec_differences(one, other):
        if under(key, RESULT_KEYS) and not under(key, NOT_RESULT_KEYS):
            yield key, values[0], values[1]


def under(key: str, parents: tuple[str, ...]) -> bool:
    """Whether the dotted `key` is one of `parents` or below one."""
    return any(f"{key}.".startswith(f"{parent}.") for parent in parents)


class ReferenceWatch:
    """Compares a run's validation losses with its reference, if it has one.

    Args:
        spec: the run.
        data_directory: its shards.
    """

    def __init__(self, spec: RunSpec, data_directory: Path):
        self.off = why_off(spec, data_directory)
        self.reference = None if self.off else spec.reference
        self.note: str | None = None  # for the log, at the start
        if self.reference is not None:
            self.note = f"reference: {self.reference.curves[0].name}"
        elif spec.reference is not None:
            self.note = f"reference off: {self.off}"

    def compare(self, step: int, loss: float) -> Comparison | None:
        """The comparison after `step` steps; None if it is off, or there is nothing to compare."""
        if self.reference is None or not math.isfinite(loss):
            return None
        return compare_loss(self.reference, step, loss)
