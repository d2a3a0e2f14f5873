"""What an experiment's runs say: base and idea seed by seed, the scatter of seeds, whether two runs have the same bits.

Two measures of a difference that seeds and validation documents blur less than they blur a validation loss:

- the training loss, where it is that of the next token alone, on tokens seen for the first time: that is a validation
  on many more tokens than the validation set has, as long as both runs see the same ones in the same order
- differences within pairs of one seed: their scatter gives the error of their mean
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogpt.console import markdown_table
from nanogpt.errors import InputError
from nanogpt.experiment.ends import LAST, VALIDATION, read_ends
from nanogpt.experiment.measurements import prefix_of
from nanogpt.experiment.queues import Outcome, Place, newest_run
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.metrics import RunMetrics, read_run
from nanogpt.runs.record import read_record
from nanogpt.spec import RunSpec

SEEN = 0.001  # the difference that an experiment should tell from none: two standard errors
BLOCK_STEPS = 10  # losses of neighbouring steps are not independent: the error is that of means over this many
TRAINING = "training loss of the next token"


def report(place: Place, prefixes: Sequence[str], ideas: Iterable[str], outcomes: Sequence[Outcome]) -> list[str]:
    """All tables as Markdown, of this call's measurements and any runs that an earlier one left.

    prefixes: of the recipes' measurements; "" is the first.
    """
    rows = [(o.name, o.gpus, f"{o.seconds:.0f}", o.text) for o in outcomes]
    lines = markdown_table(("measurement", "GPU", "s", "outcome"), rows)
    pairs = [pair for p in prefixes for pair in ((f"{p}again", f"{p}fast"), (f"{p}plain", f"{p}fast"))]
    pairs += [(f"{prefix}{name}", name) for prefix in prefixes[1:] for name in ("fast", "whole")]
    pairs += [(idea, f"{prefix_of(idea, prefixes)}fast") for idea in ideas]
    for name, other in pairs:
        for found in (differences(place, name, other), judged(place, name, other)):
            if found:
                lines += ["", *found]
    if found := scatter(place, dict.fromkeys(name for pair in pairs for name in pair)):
        lines += ["", *found]
    for prefix in prefixes:
        lines += same_bits(place, prefix)
    return lines


def differences(place: Place, name: str, other: str) -> list[str]:
    """`name` minus `other` at each evaluation, by pairs of one seed, with the pairs' mean and its standard error.

    Runs of different lengths are not a pair: the same step is at another place in the schedule.
    """
    pairs: list[dict[int, float]] = []
    for run, base in _pairs(place, name, other):
        ours, theirs = (
            {e["step"]: e["val_loss"] for e in each.metrics.evaluations if e["val_loss"] is not None}
            for each in (run, base)
        )
        pairs.append({step: ours[step] - theirs[step] for step in ours.keys() & theirs.keys()})
    rows = []
    for step in sorted({step for pair in pairs for step in pair}):
        found = [pair[step] for pair in pairs if step in pair]
        error = f"{statistics.stdev(found) / len(found) ** 0.5:.4f}" if len(found) > 1 else ""
        rows.append((step, ", ".join(f"{d:+.4f}" for d in found), f"{statistics.mean(found):+.4f}", error))
    return markdown_table(("step", f"{name} - {other}", "mean", "standard error"), rows) if rows else []


def judged(place: Place, name: str, other: str) -> list[str]:
    """`name` minus `other` by each measure that both have: the pairs' mean, its error, and how many seeds it takes.

    "of the steps alone" is the error that batches cause in the training loss, in the mean of the pairs; the standard
    error includes seeds too. The number of seeds is the one at which `SEEN` would be two standard errors.
    """
    found: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for run, base in _pairs(place, name, other):
        if (paired := training_difference(run, base)) is not None:
            measure, difference, error = paired
            found.setdefault(measure, []).append(difference)
            errors.setdefault(measure, []).append(error)
        theirs = base.ends()
        for of_set, loss in run.ends().items():
            if of_set in theirs:
                found.setdefault(f"{of_set} loss at the end", []).append(loss - theirs[of_set])
    rows = []
    for measure, each in found.items():
        of_steps = f"{math.hypot(*errors[measure]) / len(each):.5f}" if measure in errors else ""
        rows.append((measure, len(each), f"{statistics.mean(each):+.5f}", *_spread(each), of_steps))
    head = ("measure", "pairs", f"{name} - {other}", "standard error", f"seeds to see {SEEN}", "of the steps alone")
    return markdown_table(head, rows) if rows else []


def scatter(place: Place, names: Iterable[str]) -> list[str]:
    """How the losses of one measurement's seeds scatter: the standard deviation, from two seeds on.

    For the validation at the end, and for the mean of the training losses that are of the next token alone.
    """
    rows = []
    for name in names:
        losses: dict[str, list[float]] = {}
        for run in _seeds(place, name).values():
            at_end = dict(run.ends())
            trained = [loss for _, loss in run.next_token_losses().values()]
            if at_end and trained:
                at_end[TRAINING] = statistics.mean(trained)
            for of_set, loss in at_end.items():
                losses.setdefault(of_set, []).append(loss)
        for of_set, each in losses.items():
            if len(each) > 1:
                shown = (
                    f"{statistics.mean(each):.4f}",
                    f"{statistics.stdev(each):.4f}",
                    f"{max(each) - min(each):.4f}",
                )
                rows.append((name, of_set, len(each), *shown))
    head = ("seeds of", "losses", "seeds", "mean", "standard deviation", "range")
    return markdown_table(head, rows) if rows else []


def _spread(differences: Sequence[float]) -> tuple[str, str]:
    """The standard error of their mean, and how many it would take for `SEEN`; unknown for a single one."""
    if len(differences) == 1:
        return "", ""
    deviation = statistics.stdev(differences)
    return f"{deviation / len(differences) ** 0.5:.5f}", str(max(1, math.ceil((2 * deviation / SEEN) ** 2)))


@dataclass(frozen=True)
class SeedRun:
    """The run of one seed."""

    path: Path
    metrics: RunMetrics
    spec: RunSpec

    def ends(self) -> Mapping[str, float]:
        """Losses of its last weights by validation set, if it has finished."""
        last = self.metrics.evaluations[-1:]
        if not last or last[0]["step"] != self.metrics.total_steps or last[0]["val_loss"] is None:
            return {}
        return {VALIDATION: last[0]["val_loss"], **dict(read_ends(self.path)).get(LAST, {})}

    def next_token_losses(self) -> dict[int, tuple[object, float]]:
        """By step: (tokens so far and over which classes, loss), where the loss is of nothing but the next token."""
        stages = self.spec.training.all_stages
        return {
            step["step"]: ((step["tokens"], stages[step["stage"]].candidates), step["train_loss"])
            for step in self.metrics.steps
            if step.get("train_loss") is not None and stages[step["stage"]].terms[:2] == (1, False)
        }

    def seen_once(self) -> bool:
        """Whether its record says that no token was trained on twice."""
        try:
            record = read_record(self.path)
        except InputError:
            return False
        return record.data is not None and record.data.passes == 1


def training_difference(run: SeedRun, base: SeedRun) -> tuple[str, float, float] | None:
    """(measure, mean difference, its error) over the steps where both losses are of the next token, on equal tokens."""
    ours, theirs = run.next_token_losses(), base.next_token_losses()
    steps = [step for step in sorted(ours.keys() & theirs.keys()) if ours[step][0] == theirs[step][0]]
    if len(steps) < 2 * BLOCK_STEPS or run.spec.data != base.spec.data:
        return None
    each = [ours[step][1] - theirs[step][1] for step in steps]
    blocks = [statistics.mean(each[at : at + BLOCK_STEPS]) for at in range(0, len(each) - BLOCK_STEPS + 1, BLOCK_STEPS)]
    measure = f"{TRAINING}, steps {steps[0]} to {steps[-1]}"
    if not (run.seen_once() and base.seen_once()):
        measure += ", tokens maybe seen before"
    return measure, statistics.mean(each), statistics.stdev(blocks) / math.sqrt(len(blocks))


def _pairs(place: Place, name: str, other: str) -> Iterator[tuple[SeedRun, SeedRun]]:
    """The runs of both with the same seed. Runs of different lengths are not a pair."""
    ours, theirs = _seeds(place, name), _seeds(place, other)
    for seed, base in theirs.items():
        run = ours.get(seed)
        if run is not None and run.metrics.total_steps == base.metrics.total_steps:
            yield run, base


def _seeds(place: Place, name: str) -> dict[str, SeedRun]:
    """A measurement's runs that have written anything, by the end of their directory's name."""
    found = {}
    for directory in sorted(place.runs(name).parent.glob(f"{name}*")):
        seed = directory.name.removeprefix(name)
        path = newest_run(directory)
        if (seed and not re.fullmatch(r"-\d+", seed)) or path is None:
            continue
        metrics = _read(directory)
        if metrics is not None:
            found[seed] = SeedRun(path, metrics, RunDirectory.open(path).spec())
    return found


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
