"""What an experiment's runs say: base and idea seed by seed, and whether two runs have the same bits."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanogpt.console import markdown_table
from nanogpt.errors import InputError
from nanogpt.experiment.measurements import prefix_of
from nanogpt.experiment.queues import Outcome, Place, newest_run
from nanogpt.runs.metrics import RunMetrics, read_run


def report(place: Place, prefixes: Sequence[str], ideas: Iterable[str], outcomes: Sequence[Outcome]) -> list[str]:
    """All tables as Markdown, of this call's measurements and of whatever runs an earlier one left.

    prefixes: of the recipes' measurements; "" is the first.
    """
    rows = [(o.name, o.gpus, f"{o.seconds:.0f}", o.text) for o in outcomes]
    lines = markdown_table(("measurement", "GPU", "s", "outcome"), rows)
    pairs = [pair for p in prefixes for pair in ((f"{p}again", f"{p}fast"), (f"{p}plain", f"{p}fast"))]
    pairs += [(f"{prefix}{name}", name) for prefix in prefixes[1:] for name in ("fast", "whole")]
    pairs += [(idea, f"{prefix_of(idea, prefixes)}fast") for idea in ideas]
    for name, other in pairs:
        if found := differences(place, name, other):
            lines += ["", *found]
    for prefix in prefixes:
        lines += same_bits(place, prefix)
    return lines


def differences(place: Place, name: str, other: str) -> list[str]:
    """`name` minus `other` at each evaluation, by pairs of one seed, with the pairs' mean and its standard error.

    Runs of different lengths are no pair: the same step is at another place of the schedule.
    """
    pairs: list[dict[int, float]] = []
    for directory in sorted(place.runs(other).parent.glob(f"{other}*")):
        seed = directory.name.removeprefix(other)
        if seed and not re.fullmatch(r"-\d+", seed):
            continue
        run, base = _read(directory.with_name(f"{name}{seed}")), _read(directory)
        if run is None or base is None or run.total_steps != base.total_steps:
            continue
        ours, theirs = (
            {e["step"]: e["val_loss"] for e in each.evaluations if e["val_loss"] is not None} for each in (run, base)
        )
        pairs.append({step: ours[step] - theirs[step] for step in ours.keys() & theirs.keys()})
    rows = []
    for step in sorted({step for pair in pairs for step in pair}):
        found = [pair[step] for pair in pairs if step in pair]
        error = f"{statistics.stdev(found) / len(found) ** 0.5:.4f}" if len(found) > 1 else ""
        rows.append((step, ", ".join(f"{d:+.4f}" for d in found), f"{statistics.mean(found):+.4f}", error))
    return markdown_table(("step", f"{name} - {other}", "mean", "standard error"), rows) if rows else []


def same_bits(place: Place, prefix: str) -> list[str]:
    """Whether both deterministic runs of a recipe, where there are two, have the same losses to the last bit."""
    runs = [_read(place.runs(f"{prefix}{name}")) for name in ("deterministic", "deterministic-again")]
    losses = []
    for run in runs:
        if run is None:
            return []
        steps = [s["train_loss"] for s in run.steps if s.get("train_loss") is not None]
        losses.append(([e["val_loss"] for e in run.evaluations], steps))
    same = losses[0] == losses[1]
    return ["", f"{prefix}deterministic, twice: losses {'equal bit by bit' if same else 'DIFFER'}"]


def runs_to_compare(place: Place, prefix: str) -> list[Path]:
    """The runs of a recipe that `nanogpt compare` is for, as many as there are, the fast one first."""
    found = (newest_run(place.runs(f"{prefix}{name}")) for name in ("fast", "again", "plain"))
    return [path for path in found if path is not None]


def _read(directory: Path) -> RunMetrics | None:
    """The newest run in `directory`; None where there is none that has written anything."""
    path = newest_run(directory)
    try:
        return None if path is None else read_run(path)
    except InputError:
        return None
