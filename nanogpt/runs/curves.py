"""What to draw of a run: thinned points, smoothed training loss, where stages begin. Numbers, for any plot.

A curve of a million steps is reduced to the lowest and highest of each group: no more points than one can see.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanogpt.runs.metrics import Records, RunMetrics

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

MOST_POINTS = 4_000  # of a curve; a picture is 1,650 pixels wide
SMOOTHED_SHARE = 0.02  # of the run's steps, in a mean
LAST_SHARE = 0.1  # of a run's steps, shown again separately

Points = list[tuple[float, float]]


def points(records: Records, x: str, y: str, most: int = MOST_POINTS) -> Points:
    """(x, y) of the records that have both, thinned out to `most`; the extremes and the last stay."""
    return _thinned(*_known(records.column(x), records.column(y)), most)


def smoothed_training(run: RunMetrics, x: str, most: int = MOST_POINTS) -> list[Points]:
    """Training loss by `x`, a key of the step records: one curve per stage, each step the mean of its neighbours.

    Stages are separate because their losses are: each weights the tokens ahead differently.
    """
    import numpy as np

    steps = run.steps
    width = max(1, round(SMOOTHED_SHARE * len(steps)))
    xs, losses, stages = steps.column(x), steps.column("train_loss"), np.nan_to_num(steps.column("stage"))
    cuts = [0, *(np.flatnonzero(np.diff(stages)) + 1).tolist(), len(steps)]
    if len(cuts) > most // 2:  # no run has so many stages
        cuts = [0, len(steps)]
    found = []
    for first, last in itertools.pairwise(cuts):
        part_x, part = _known(xs[first:last], losses[first:last])
        if len(part):
            found.append(_thinned(part_x, _means(part, width), max(2, most // (len(cuts) - 1))))
    return found


def _means(values: Array, width: int) -> Array:
    """Each value's mean with those up to width / 2 before and after it, fewer at the ends."""
    import numpy as np

    before = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    means: Array = (before[high] - before[low]) / (high - low)
    return means


def stage_starts(run: RunMetrics) -> list[tuple[int, int, float | None]]:
    """(stage from 1 on, steps done before it, milliseconds of the clock before it) of each stage that has begun."""
    import numpy as np

    stages = run.steps.column("stage")
    if not len(stages) or np.isnan(stages).any():
        return []
    changes = (np.flatnonzero(np.diff(stages)) + 1).tolist()
    if len(changes) > 100:
        return []
    steps, ms = run.steps.column("step"), run.steps.column("train_time_ms")
    found: list[tuple[int, int, float | None]] = [(int(stages[0]) + 1, 0, 0.0)]
    for place in changes:
        time = float(ms[place - 1])
        found.append((int(stages[place]) + 1, int(steps[place - 1]), None if math.isnan(time) else time))
    return found


@dataclass(frozen=True)
class LastTenth:
    """Validation near the end: a curve for each run, empty if it was validated at most once."""

    curves: list[Points]
    unit: str  # of x
    first: float  # the last tenth begins here
    last: float
    from_first_run: bool  # losses are differences from the first run's


def last_tenth(runs: Sequence[RunMetrics]) -> LastTenth | None:
    """The last tenth of each run; None if nothing was validated twice.

    By steps if all runs end at the same one, and as differences if they were validated at the same steps; else by
    per cent of each run's steps.
    """
    curves = [points(run.evaluations, "step", "val_loss") for run in runs]
    curves = [curve if len(curve) > 1 and curve[-1][0] > 0 else [] for curve in curves]
    ends = {curve[-1][0] for curve in curves if curve}
    if not ends:
        return None
    if len(ends) > 1:
        shares = [[(100 * x / curve[-1][0], y) for x, y in curve] for curve in curves]
        return LastTenth(shares, "per cent of the run's steps", 100 * (1 - LAST_SHARE), 100.0, False)
    (end,) = ends
    first = curves[0]
    if len(runs) > 1 and all([x for x, _ in curve] == [x for x, _ in first] for curve in curves):
        apart = [[(x, y - of_first) for (x, y), (_, of_first) in zip(curve, first, strict=True)] for curve in curves]
        return LastTenth(apart, "step", end * (1 - LAST_SHARE), end, True)
    return LastTenth(curves, "step", end * (1 - LAST_SHARE), end, False)


def between(curve: Points, first: float, last: float) -> list[float]:
    """The values of `curve` in this range of x, with those at its ends, read off the lines between points."""
    import numpy as np

    xs = [x for x, _ in curve]
    inside = [y for x, y in curve if first <= x <= last]
    ends = [x for x in (first, last) if xs and xs[0] <= x <= xs[-1]]
    return inside + [float(np.interp(x, xs, [y for _, y in curve])) for x in ends]


def _known(xs: Array, ys: Array) -> tuple[Array, Array]:
    import numpy as np

    known = ~(np.isnan(xs) | np.isnan(ys))
    return xs[known], ys[known]


def _thinned(xs: Array, ys: Array, most: int) -> Points:
    if len(xs) > most:
        size = -(-2 * len(xs) // most)
        kept = {0, len(xs) - 1}
        for first in range(0, len(xs), size):
            part = ys[first : first + size]
            kept |= {first + int(part.argmin()), first + int(part.argmax())}
        order = sorted(kept)
        xs, ys = xs[order], ys[order]
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def time_unit(runs: Sequence[RunMetrics]) -> tuple[float, str]:
    """Factor from milliseconds, and the unit's name, for the longest of the runs."""
    longest = max((float(run.last.get("train_time_ms") or 0) for run in runs), default=0)
    for unit, ms in (("hours", 3_600_000), ("minutes", 60_000)):
        if longest >= 5 * ms:
            return 1 / ms, unit
    return 1 / 1000, "seconds"
