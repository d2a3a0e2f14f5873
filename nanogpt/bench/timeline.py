"""A picture of a step's communication, from Chrome traces: what NCCL does and what is computed at the same time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.bench.exposed import Activity, Interval, activities, alone, computing, length, read_trace
from nanogpt.errors import InputError
from nanogpt.runs.plot import COLOURS, check_suffix, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {"AllReduce": "all-reduce", "ReduceScatter": "reduce-scatter", "AllGather": "all-gather"}
OTHER_KIND = "other collectives"
APART_US = 5_000.0  # without NCCL: another step's communication follows
MARGIN_US = 1_000.0  # shown before and after it


def read_stages(directory: Path, rank: int) -> dict[int, list[Activity]]:
    """Stage -> what ran on that rank's GPU, from the traces that `bench profile --traces` left in `directory`.

    Raises:
        InputError: there is no trace of that rank.
    """
    named = {path: re.fullmatch(rf"stage-(\d+)\.rank-{rank}\.json", path.name) for path in directory.iterdir()}
    found = {int(match[1]): activities(read_trace(path)) for path, match in named.items() if match}
    if not found:
        raise InputError(f"{directory}: no stage-N.rank-{rank}.json; `nanogpt bench profile --traces` makes them")
    return dict(sorted(found.items()))


def busiest_step(ran: Sequence[Activity]) -> list[Activity]:
    """The part of `ran` around the communication of the step that has the most of it; empty without NCCL."""
    nccl = [run for run in ran if run.is_communication]
    if not nccl:
        return []
    cuts = [i for i, (a, b) in enumerate(pairwise(nccl), 1) if b.start - a.end > APART_US]
    parts = [nccl[a:b] for a, b in pairwise([0, *cuts, len(nccl)])]
    # By the number of collectives: one that waits for a late rank is long and says little.
    most = max(parts, key=len)
    first, last = most[0].start - MARGIN_US, max(run.end for run in most) + MARGIN_US
    return [run for run in ran if run.end > first and run.start < last]


def plot_timeline(stages: Mapping[int, Sequence[Activity]], path: Path) -> None:
    """Draw the communication of one step of each of `stages` into `path`, .png or .svg.

    Raises:
        InputError: another suffix, or NCCL did nothing.
        RunError: the file cannot be written.
    """
    check_suffix(path)
    steps = {stage: step for stage, ran in stages.items() if (step := busiest_step(ran))}
    if not steps:
        raise InputError(f"{path}: nothing to draw: these traces are of one GPU and have no communication")
    colours = dict(zip((*KINDS.values(), OTHER_KIND), COLOURS[1:], strict=False))
    with new_figure(11, 1.2 + 1.7 * len(steps)) as figure:
        shown: set[str] = set()
        for axes, (stage, ran) in zip(figure.subplots(len(steps), 1, squeeze=False)[:, 0], steps.items(), strict=True):
            began = min(run.start for run in ran if run.is_communication)
            exposed = alone(ran)
            _draw(axes, 2, computing(ran), began, COLOURS[0])
            for kind, colour in colours.items():
                if intervals := [(run.start, run.end) for run in ran if _kind(run) == kind]:
                    _draw(axes, 1, intervals, began, colour, None if kind in shown else kind)
                    shown.add(kind)
            _draw(axes, 0, exposed, began, COLOURS[-1])
            axes.set_yticks((2, 1, 0), ("computing", "NCCL", "NCCL alone"))
            axes.set_ylim(-0.5, 2.5)
            axes.set_xlim(-MARGIN_US / 1000, (max(run.end for run in ran) - began) / 1000)
            alone_ms = length(exposed) / 1000
            axes.set_title(f"stage {stage}: {alone_ms:.2f} ms in which NCCL runs alone", loc="left", fontsize=11)
            axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds since the step's first collective began")
        figure.legend(loc="outside upper right", ncols=len(shown))
        save(figure, path)


def _kind(run: Activity) -> str | None:
    """The kind of a collective; None for anything else."""
    if not run.is_communication:
        return None
    return next((kind for name, kind in KINDS.items() if name in run.name), OTHER_KIND)


def _draw(
    axes: Axes, row: int, intervals: Sequence[Interval], began: float, colour: str, label: str | None = None
) -> None:
    bars = [((start - began) / 1000, (end - start) / 1000) for start, end in intervals]
    axes.broken_barh(bars, (row - 0.35, 0.7), color=colour, linewidth=0, label=label)
