"""How much of the communication between GPUs is exposed: time in which nothing but NCCL's kernels runs on a GPU.

Read from a Chrome trace, as torch.profiler exports it. An NCCL kernel runs from the moment that this rank arrives to
the moment that the data do: waiting for a late rank counts as communication.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanogpt.console import markdown_table

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of what runs on a GPU
Interval = tuple[float, float]


class Activity(NamedTuple):
    """Something that ran on a GPU, with its start and end in microseconds."""

    start: float
    end: float
    name: str

    @property
    def is_communication(self) -> bool:
        """Whether it is a kernel of NCCL's."""
        return self.name.lower().startswith("nccl")


@dataclass(frozen=True)
class Exposure:
    """Milliseconds of a step on one GPU. `span` = `computing` + `exposed` + `idle`."""

    span: float  # from the first kernel's start to the last one's end
    computing: float  # something other than NCCL ran, whether or not NCCL did too
    communicating: float  # NCCL ran
    exposed: float  # NCCL alone ran
    idle: float  # nothing ran


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace."""
    content = json.loads(path.read_bytes())
    events: list[dict[str, Any]] = content["traceEvents"] if isinstance(content, dict) else content
    return events


def activities(events: Iterable[Mapping[str, Any]]) -> list[Activity]:
    """What ran on the GPU, in order of its start.

    Events are Chrome's: `ts` and `dur` in microseconds, `cat` one of ON_DEVICE.
    """
    found = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE:
            start = float(event["ts"])
            found.append(Activity(start, start + float(event.get("dur", 0)), str(event["name"])))
    return sorted(found)


def exposure(events: Iterable[Mapping[str, Any]], steps: int = 1) -> Exposure:
    """The exposure per step in one GPU's events of `steps` steps; all zeros if nothing ran on a GPU."""
    found = activities(events)
    if not found:
        return Exposure(0, 0, 0, 0, 0)
    span = max(run.end for run in found) - found[0].start
    computes, exposed = length(computing(found)), length(alone(found))
    each = 1 / (1000 * steps)
    return Exposure(
        span=span * each,
        computing=computes * each,
        communicating=length(communicating(found)) * each,
        exposed=exposed * each,
        idle=(span - computes - exposed) * each,
    )


def computing(ran: Iterable[Activity]) -> list[Interval]:
    """When something other than NCCL ran: disjoint and sorted, like the next two."""
    return _union((run.start, run.end) for run in ran if not run.is_communication)


def communicating(ran: Iterable[Activity]) -> list[Interval]:
    """When NCCL ran."""
    return _union((run.start, run.end) for run in ran if run.is_communication)


def alone(ran: Sequence[Activity]) -> list[Interval]:
    """When nothing but NCCL ran."""
    exposed = []
    work = computing(ran)
    for start, end in communicating(ran):
        at = start
        for busy_from, busy_to in work:
            if busy_to > at and busy_from < end:
                if busy_from > at:
                    exposed.append((at, busy_from))
                at = busy_to
        if at < end:
            exposed.append((at, end))
    return exposed


def length(intervals: Iterable[Interval]) -> float:
    """The total length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint, sorted intervals that cover the same time."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def as_table(stages: Sequence[Sequence[Exposure]]) -> str:
    """Stages by ranks as Markdown: the rank with the most exposed communication, and the mean over ranks."""
    head = (
        "stage",
        "ms a step",
        "computing",
        "communicating",
        "exposed, mean of ranks",
        "exposed, most",
        "share",
        "idle",
    )
    rows = []
    for stage, ranks in enumerate(stages):
        worst = max(ranks, key=lambda rank: rank.exposed)
        mean = sum(rank.exposed for rank in ranks) / len(ranks)
        share = worst.exposed / worst.span if worst.span else 0.0
        rows.append(
            (
                stage + 1,
                *(f"{ms:.2f}" for ms in (worst.span, worst.computing, worst.communicating, mean)),
                f"{worst.exposed:.2f} (rank {list(ranks).index(worst)})",
                f"{share:.1%}",
                f"{worst.idle:.2f}",
            )
        )
    return "\n".join(markdown_table(head, rows))
