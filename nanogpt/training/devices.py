"""Which of a run's GPUs is the slowest, where they are of different kinds: all of them wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nanogpt.runs.record import Rank

# Dense bf16 matrix products in TFLOP/s and memory in TB/s, by the data sheets; the first name that a device's contains.
SPEEDS = (
    ("B300", 2250, 8.0),
    ("B200", 2250, 8.0),
    ("GH200", 989, 4.0),
    ("H200", 989, 4.8),
    ("H100 PCIe", 756, 2.0),
    ("H100", 989, 3.35),
    ("H800", 989, 3.35),
    ("A100", 312, 1.9),
    ("A800", 312, 1.9),
    ("L40S", 362, 0.86),
    ("L40", 181, 0.86),
    ("L4", 121, 0.3),
    ("A40", 150, 0.7),
    ("A10", 125, 0.6),
    ("4090", 165, 1.0),
    ("V100", 125, 0.9),
    ("T4", 65, 0.3),
)


def device_speed(name: str) -> tuple[float, float] | None:
    """(TFLOP/s, TB/s) of the device that CUDA calls `name`; None: not known."""
    for part, flops, memory in SPEEDS:
        if part.lower() in name.lower():
            return flops, memory
    return None


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
