"""The slowest of a run's GPUs, if they are of different kinds: all others wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nanogpt.gpus import device_speed
from nanogpt.runs.record import Rank


def unlike_devices(ranks: Sequence[Rank]) -> str | None:
    """A warning that names the slowest if the ranks' devices differ; None if they are alike."""
    kinds = Counter(rank.device for rank in ranks)
    if len(kinds) < 2:
        return None
    speeds = {kind: device_speed(kind) for kind in kinds}
    shown = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    known = {kind: speed for kind, speed in speeds.items() if speed is not None}
    if len(known) < len(kinds):
        unknown = ", ".join(sorted(set(kinds) - set(known)))
        rest = f"The speed of {unknown} is unknown; all ranks wait for the slowest"
        return f"warning: GPUs of different kinds in one run: {shown}. {rest}"
    slowest = min(known, key=lambda kind: known[kind])
    where = ", ".join(f"{rank.rank} on {rank.host}" for rank in ranks if rank.device == slowest)
    rest = f"All ranks wait for the slowest, {slowest} (rank {where})"
    return f"warning: GPUs of different kinds in one run: {shown}. {rest}"
