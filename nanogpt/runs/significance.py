"""Whether the mean validation loss of several runs is below the target: a one-sided t-test, and how many more it needs.

The public rule: mean validation loss over enough runs is at most 3.28, with p < 0.01.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanogpt.errors import InputError
from nanogpt.runs.loaded import IDENTITY_KEYS, LoadedRun, differences

if TYPE_CHECKING:
    from rich.console import RenderableType

TARGET = 3.28
ALPHA = 0.01
MOST_RUNS = 10_000  # beyond this a number is not worth giving


@dataclass(frozen=True)
class Significance:
    """What a set of final validation losses (nats) says about the mean and a target."""

    losses: tuple[float, ...]
    target: float
    alpha: float
    mean: float
    sd: float | None  # of the sample (n - 1); None for one run
    t: float | None
    p: float | None  # probability of a mean this low if the true mean is the target
    runs_needed: int | None  # in all, at this mean and spread; None: no number suffices, or one run is too few to tell

    @property
    def n(self) -> int:
        """Runs."""
        return len(self.losses)

    @property
    def significant(self) -> bool:
        """Whether the mean is below the target with p < alpha."""
        return self.p is not None and self.p < self.alpha

    @property
    def more_runs(self) -> int | None:
        """How many more are needed at this mean and spread; 0 if significant."""
        if self.significant:
            return 0
        return None if self.runs_needed is None else max(self.runs_needed - self.n, 1)

    def verdict(self) -> str:
        """One sentence."""
        if self.p is None:
            return "not shown: one run says nothing about the spread; at least two are needed"
        if self.significant:
            return f"significant: the mean is below {self.target:g}, p = {self.p:.2g} < {self.alpha:g}"
        if self.mean >= self.target:
            return f"not shown: the mean {self.mean:.5f} is not below {self.target:g}; more such runs do not help"
        if self.more_runs is None:
            more = f"more than {MOST_RUNS:,} runs would be needed"
        else:
            more = f"about {self.more_runs} more {'run' if self.more_runs == 1 else 'runs'} at this mean and spread"
        return f"not shown yet: p = {self.p:.2g}, p must be < {self.alpha:g}: {more}"


def significance(losses: Sequence[float], *, target: float = TARGET, alpha: float = ALPHA) -> Significance:
    """The one-sided one-sample t-test that the mean of `losses` (one per run) is below `target`.

    Raises `InputError` for no losses, one that is not finite, or an alpha outside 0 to 1.
    """
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise InputError(f"significance: needs a finite loss from each run, found {list(losses)}")
    if not 0 < alpha < 1:
        raise InputError(f"--alpha: found {alpha}, expected a probability between 0 and 1, such as {ALPHA}")
    values = tuple(float(loss) for loss in losses)
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Significance(values, target, alpha, mean, None, None, None, None)
    sd = statistics.stdev(values)
    if sd == 0:  # the test divides by it
        below = mean < target
        t = -math.inf if below else math.inf if mean > target else 0.0
        p = 0.0 if below else 1.0 if mean > target else 0.5
        return Significance(values, target, alpha, mean, sd, t, p, 2 if below else None)
    from scipy import stats

    test = stats.ttest_1samp(values, target, alternative="less")
    needed = _runs_needed((mean - target) / sd, alpha)
    return Significance(values, target, alpha, mean, sd, float(test.statistic), float(test.pvalue), needed)


def _runs_needed(effect: float, alpha: float) -> int | None:
    """The smallest n for which a mean `effect` standard deviations from the target has p < alpha."""
    if effect >= 0:
        return None
    from scipy import stats

    def enough(n: int) -> bool:
        return float(stats.t.cdf(effect * math.sqrt(n), n - 1)) < alpha

    low, high = 1, 2  # p falls with n
    while not enough(high):
        if high >= MOST_RUNS:
            return None
        low, high = high, min(2 * high, MOST_RUNS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def runs_significance(runs: Sequence[LoadedRun], *, target: float | None = None, alpha: float = ALPHA) -> Significance:
    """`significance` of finished runs of one spec, code and hardware.

    Args:
        runs: several runs with records, which may differ in seed, name, output and data directory.
        target: None: the runs' own target loss, else 3.28.
        alpha: p must be below it.

    Raises:
        InputError: a run is unfinished, a copy of another, or differs from the first; says how.
    """
    unfinished = [f"  {run.label}: {run.why_unfinished}" for run in runs if run.why_unfinished]
    if unfinished:
        raise InputError("\n".join(["significance: these runs have no result; leave them out:", *unfinished]))
    for one, other in itertools.combinations(runs, 2):
        if one.curve() == other.curve():
            raise InputError(
                f"{other.path}: a copy of {one.path}, loss for loss and time for time; each run counts once"
            )
    differing = differences(runs, ignore=IDENTITY_KEYS)
    if differing:
        lines = [f"  {difference.line([run.label for run in runs])}" for difference in differing]
        raise InputError("\n".join(["significance: runs must agree in spec, code and hardware; these differ:", *lines]))
    if target is None:
        target = runs[0].spec.evaluation.target_loss or TARGET
    return significance([run.final_loss for run in runs if run.final_loss is not None], target=target, alpha=alpha)


def significance_data(result: Significance, runs: Sequence[LoadedRun]) -> dict[str, Any]:
    """The test as JSON data."""
    return {
        "runs": [
            {
                "run": run.label,
                "seed": run.spec.training.seed,
                "val_loss": run.final_loss,
                "train_seconds": run.train_seconds,
            }
            for run in runs
        ],
        "n": result.n,
        "mean": result.mean,
        "sd": result.sd,
        "target": result.target,
        "alpha": result.alpha,
        "t": _finite(result.t),
        "p": result.p,
        "significant": result.significant,
        "more_runs": result.more_runs,
        "verdict": result.verdict(),
        "repeated_seeds": repeated_seeds(runs),
    }


def repeated_seeds(runs: Sequence[LoadedRun]) -> list[int]:
    """Seeds that several runs share: these differ by rounding alone, less than runs with different seeds."""
    seeds = [run.spec.training.seed for run in runs]
    return sorted({seed for seed in seeds if seeds.count(seed) > 1})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def significance_table(result: Significance, runs: Sequence[LoadedRun]) -> RenderableType:
    """The runs and the test as tables."""
    from rich.console import Group
    from rich.text import Text

    from nanogpt.console import new_table
    from nanogpt.runs.table import seconds_text

    table = new_table("run", "seed", "validation loss", "training time", wrap=["run"])
    for run in runs:
        seconds = run.train_seconds
        table.add_row(
            run.label,
            str(run.spec.training.seed),
            f"{run.final_loss:.4f}",
            seconds_text(None if seconds is None else 1000 * seconds),
        )
    spread = "" if result.sd is None else f", standard deviation {result.sd:.5f}"
    test = "" if result.t is None else f", t = {result.t:.3f}, p = {result.p:.3g}"
    return Group(
        table,
        Text(f"n = {result.n}, mean {result.mean:.5f}{spread}; target {result.target:g}{test}"),
        Text(result.verdict(), style="bold"),
    )
