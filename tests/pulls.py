"""Pull lists for tests that have no batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nanogpt.optim.pull_lists import PullLists, Share, StepReader


def lists_of(*steps: Sequence[npt.NDArray[Any]], rows: int, rank: int = 0, size: int = 1) -> PullLists:
    """Of a cycle of `steps`, each the rows that its slots read, in order. rows: of the table."""
    reads = []
    for slots in steps:
        reader = StepReader(share := Share(rows, rank, size))
        for slot, read in enumerate(slots):
            reader.add(slot % size, np.asarray(read).ravel())
        reads.append(reader.reads())
    return share.lists(reads)
