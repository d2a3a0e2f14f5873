"""A picture of a step's communication: what computes and what NCCL does at the same time, from Chrome traces."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from nanogpt.errors import InputError
from nanogpt.runs.plot import COLOURS, check_suffix, new_figure, save
from nanogpt.training.exposed import Activity, Interval, activities, read_trace, union

KINDS = {"AllReduce": "all-reduce", "ReduceScatter": "reduce-scatter", "AllGather": "all-gather"}
OTHER_KIND = "other collectives"
APART_US = 5_000.0  # without NCCL: another step's communication follows
MARGIN_US = 1_000.0  # shown before and after it


def read_stages(directory: Path, rank: int) -> dict[int, list[Activity]]:
    """Stage -> what ran on that rank's GPU, from the traces that `bench profile --traces` has kept in `directory`.

    Raises:
        InputError: there is none of that rank.
    """
    named = {path: re.fullmatch(rf"stage-(\d+)\.rank-{rank}\.json", path.name) for path in directory.iterdir()}
    found = {int(match[1]): activities(read_trace(path)) for path, match in named.items() if match}
    if not found:
        raise InputError(f"{directory}: no stage-N.rank-{rank}.json; `nanogpt bench profile --traces` makes them")
    return dict(sorted(found.items()))


def busiest_step(ran: Sequence[Activity]) -> list[Activity]:
    """The part of `ran` around the communication of one step: of the one that has most of it; nothing without NCCL."""
    nccl = [run for run in ran if run.is_communication]
    if not nccl:
        return []
    cuts = [i for i, (a, b) in enumerate(pairwise(nccl), 1) if b.start - a.end > APART_US]
    parts = [nccl[a:b] for a, b in pairwise([0, *cuts, len(nccl)])]
    # By number: one that waits for a late rank is long and says little.
    most = max(parts, key=len)
    first, last = most[0].start - MARGIN_US, max(run.end for run in most) + MARGIN_US
    return [run for run in ran if run.end > first and run.start < last]


def alone(ran: Sequence[Activity]) -> list[Interval]:
    """When nothing but NCCL ran."""
    exposed = []
    work = union((run.start, run.end) for run in ran if not run.is_communication)
    for start, end in union((run.start, run.end) for run in ran if run.is_communication):
        at = start
        for busy_from, busy_to in work:
            if busy_to > at and busy_from < end:
                if busy_from > at:
                    exposed.append((at, busy_from))
                at = busy_to
        if at < end:
            exposed.append((at, end))
    return exposed


def plot_timeline(stages: Mapping[int, Sequence[Activity]], path: Path) -> None:
    """Draw the communication of one step of each of `stages` into `path`, .png or .svg.

    Raises:
        InputError: another suffix, or nothing that NCCL did.
        RunError: the file cannot be written.
    """
    check_suffix(path)
    steps = {stage: step for stage, ran in stages.items() if (step := busiest_step(ran))}
    if not steps:
        raise InputError(f"{path}: nothing to draw: these traces have no communication, they are of one GPU")
    colours = dict(zip((*KINDS.values(), OTHER_KIND), COLOURS[1:], strict=False))
    with new_figure(11, 1.2 + 1.7 * len(steps)) as figure:
        drawn = set()
        for axes, (stage, ran) in zip(figure.subplots(len(steps), 1, squeeze=False)[:, 0], steps.items(), strict=True):
            began = min(run.start for run in ran if run.is_communication)
            exposed = alone(ran)
            lanes: dict[str, list[Interval]] = {"computing": [], **{kind: [] for kind in colours}}
            for run in ran:
                kind = next((kind for name, kind in KINDS.items() if name in run.name), OTHER_KIND)
                lanes[kind if run.is_communication else "computing"].append((run.start, run.end))
            lanes["computing"] = union(lanes["computing"])
            for name, intervals in (*lanes.items(), ("exposed", exposed)):
                row = {"computing": 2, "exposed": 0}.get(name, 1)
                colour = {"computing": COLOURS[0], "exposed": COLOURS[-1]}.get(name) or colours[name]
                bars = [((start - began) / 1000, (end - start) / 1000) for start, end in intervals]
                label = name if row == 1 and bars and name not in drawn else None
                axes.broken_barh(bars, (row - 0.35, 0.7), color=colour, linewidth=0, label=label)
                drawn |= {name} if label else set()
            axes.set_yticks((2, 1, 0), ("computing", "NCCL", "NCCL alone"))
            axes.set_ylim(-0.5, 2.5)
            axes.set_xlim(-MARGIN_US / 1000, (max(run.end for run in ran) - began) / 1000)
            total = sum(end - start for start, end in exposed) / 1000
            axes.set_title(f"stage {stage}: {total:.2f} ms in which NCCL runs alone", loc="left", fontsize=11)
            axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds since the step's first collective began")
        figure.legend(loc="outside upper right", ncols=len(drawn))
        save(figure, path)
