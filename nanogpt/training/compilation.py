"""Counting what torch.compile has compiled, so that a recompilation inside the clock is seen."""

from __future__ import annotations


def compiled_graphs() -> int:
    """Graphs that this process has compiled so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
