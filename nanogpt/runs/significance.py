"""Whether the mean validation loss of several runs is below the target: a one-sided t-test, and how many more it needs.

The public rule: mean validation loss over enough runs is at most 3.28, with p < 0.01.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt.errors import InputError
from nanogpt.runs.finished import FinishedRun, differences_between

TARGET = 3.28
ALPHA = 0.01
MOST_RUNS = 10_000  # more are not worth a number


@dataclass(frozen=True)
class Significance:
    """What a set of final validation losses (nats) says of the mean against a target."""

    losses: tuple[float, ...]
    target: float
    alpha: float
    mean: float
    sd: float | None  # of the sample (n - 1); None for one run
    t: float | None
    p: float | None  # that a mean this far below comes by chance from runs whose mean is the target
    runs_needed: int | None  # in all, at this mean and spread; None: no number is enough, or one run is too few to tell

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
        """How many more are needed at this mean and spread; 0 where it is significant."""
        if self.significant:
            return 0
        return None if self.runs_needed is None else max(self.runs_needed - self.n, 1)

    def verdict(self) -> str:
        """One sentence."""
        if self.p is None:
            return "not shown: one run says nothing of the spread; two at least are needed"
        if self.significant:
            return f"significant: the mean is below {self.target:g}, p = {self.p:.2g} < {self.alpha:g}"
        if self.mean >= self.target:
            return f"not shown: the mean {self.mean:.5f} is not below {self.target:g}; more runs of this do not help"
        if self.more_runs is None:
            more = f"more than {MOST_RUNS:,} runs would be needed"
        else:
            more = f"about {self.more_runs} more {'run' if self.more_runs == 1 else 'runs'} at this mean and spread"
        return f"not shown yet: p = {self.p:.2g}, needed is p < {self.alpha:g}: {more}"


def significance(losses: Sequence[float], *, target: float = TARGET, alpha: float = ALPHA) -> Significance:
    """The one-sided one-sample t-test that the mean of `losses` (one a run) is below `target`.

    Raises `InputError` for no losses, one that is not finite, or an alpha outside of 0 to 1.
    """
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise InputError(f"significance: needs a finite loss of each run, found {list(losses)}")
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


def runs_significance(
    runs: Sequence[FinishedRun], *, target: float | None = None, alpha: float = ALPHA
) -> Significance:
    """`significance` of finished runs of one spec, code and hardware.

    Args:
        runs: several runs, which may differ in seed, name, output and data directory.
        target: None is the runs' own target loss, else 3.28.
        alpha: p must be below it.

    Raises:
        InputError: a run that is not finished, is named twice or differs from the first; says how.
    """
    problems = [f"  {run.label}: {run.why_unfinished}" for run in runs if run.why_unfinished]
    if problems:
        raise InputError("\n".join(["significance: these runs have no result; leave them away:", *problems]))
    for one, other in itertools.combinations(runs, 2):
        if one.path.resolve() == other.path.resolve():
            raise InputError(f"{other.path}: named twice; each run counts once")
        if one.losses() == other.losses() and one.times() == other.times():
            raise InputError(f"{other.path}: the same losses and times as {one.path}: a copy; each run counts once")
    for other in runs[1:]:
        problems += [f"  {difference.line()}" for difference in differences_between(runs[0], other)]
    if problems:
        raise InputError(
            "\n".join(
                ["significance: only runs of one spec, code and hardware can be pooled; these differ:", *problems]
            )
        )
    if target is None:
        target = runs[0].spec.evaluation.target_loss or TARGET
    return significance([run.final_loss for run in runs], target=target, alpha=alpha)
