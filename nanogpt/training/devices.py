"""Which of a run's GPUs is the slowest, where they are of different kinds: all of them wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nanogpt.gpus import device_speed
from nanogpt.runs.record import Rank


def unlike_devices(ranks: Sequence[Rank]) -> str | None:
    """A warning where the ranks' devices are of different kinds, that names the slowest; None where they are alike."""
    kinds = Counter(rank.device for rank in ranks)
    if len(kinds) < 2:
        return None
    speeds = {kind: device_speed(kind) for kind in kinds}
    shown = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    known = {kind: speed for kind, speed in speeds.items() if speed is not None}
    if len(known) < len(kinds):
        unknown = ", ".join(sorted(set(kinds) - set(known)))
        rest = f"How fast {unknown} is, is not known; all ranks wait for the slowest"
        return f"warning: GPUs of different kinds in one run: {shown}. {rest}"
    slowest = min(known, key=lambda kind: known[kind])
    where = ", ".join(f"{rank.rank} on {rank.host}" for rank in ranks if rank.device == slowest)
    rest = f"All ranks wait for the slowest, {slowest} (rank {where})"
    return f"warning: GPUs of different kinds in one run: {shown}. {rest}"
