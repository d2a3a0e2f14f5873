"""The hardware of a run as users type it: `4xh200`, or with nodes first, `2x4xh100`.

A recipe may leave hardware open, all or part of it. Then `--on` says it, or else a `Fill`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nanogpt.errors import InputError
from nanogpt.gpus import GPU_NAMES
from nanogpt.spec import WORLD_SIZES, HardwareSpec

# Maps the stated keys of `hardware` to values for the others, and to the place that messages about these name.
Fill = Callable[[Mapping[str, Any]], tuple[dict[str, Any], str]]

EXAMPLES = "4xh200, or nodes first, 2x4xh100"
_SHAPE = re.compile(r"(?:(?P<nodes>\d+)x)?(?P<count>\d+)x(?P<gpu>[a-z]\w*)")


def parse_shape(text: str) -> dict[str, Any]:
    """`hardware` of a recipe for `2x4xh100`. Raises `InputError`; counts are not judged."""
    match = _SHAPE.fullmatch(text.strip().lower())
    if match is None or match["gpu"] not in GPU_NAMES:
        what = "expected GPUs x type" if match is None else f"{match['gpu']} is not a known type"
        raise InputError(f"--on {text}: {what}, such as {EXAMPLES}; types: {', '.join(GPU_NAMES)}")
    return {"gpu": match["gpu"], "gpus_per_node": int(match["count"]), "nodes": int(match["nodes"] or 1)}


def shape(hardware: HardwareSpec) -> str:
    """`2x4xh100`, which `--on` takes."""
    nodes = f"{hardware.nodes}x" if hardware.nodes > 1 else ""
    return f"{nodes}{hardware.gpus_per_node}x{hardware.gpu}"


def split_shape(name: str) -> tuple[str, str] | None:
    """`record89` and `4xh200` of `record89-4xh200`; None of other names."""
    start, dash, end = name.rpartition("-")
    return (start, end) if dash and _SHAPE.fullmatch(end) else None


def largest_count(gpus: int, nodes: int = 1) -> int:
    """GPUs per node that a run takes on `nodes` nodes of `gpus`; 0 if no world size fits."""
    return max((size // nodes for size in WORLD_SIZES if size % nodes == 0 and size // nodes <= gpus), default=0)
