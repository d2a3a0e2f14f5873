"""Which rows of a pulled table the ranks exchange in a cycle, worked out by each from the batches. No torch.

Every rank deals all ranks' slots (`nanogpt.data.training_batches`), so it knows what others read of its part: neither
the rows' numbers nor how many there are has to be sent, and no host waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[Any]  # of integers


class PullLists(NamedTuple):
    """What a rank sends and gets in a cycle."""

    rows: Rows  # (n,): what its tokens read; sorted, each once, and so by owner
    send_counts: list[int]  # of `rows`, by owner
    asked: Rows  # (m,): what the ranks read of its part, counted from its first row; by reader, sorted for each
    asked_counts: list[int]  # by reader
    touched: Rows  # (t,): the distinct ones of `asked`, sorted


class StepReads(NamedTuple):
    """What a step's slots read. Sorted, each number once."""

    rows: Rows  # (n,): this rank's slots
    asked: Rows  # (m,): all ranks', of this rank's part: the reader times the rows of a part, plus the place in it


class Share(NamedTuple):
    """One rank's part of a table, which all share evenly."""

    rows: int  # of the table
    rank: int
    size: int  # ranks

    @property
    def part(self) -> int:
        """Rows of each part."""
        return self.rows // self.size

    def lists(self, steps: Sequence[StepReads]) -> PullLists:
        """Those of a cycle of `steps`."""
        rows = _merged([step.rows for step in steps])
        if self.size == 1:
            return PullLists(rows, [len(rows)], rows, [len(rows)], rows)
        asked = _merged([step.asked for step in steps])
        bounds = (np.arange(self.size + 1) * self.part).astype(asked.dtype)
        send_counts, asked_counts = (np.diff(np.searchsorted(numbers, bounds)).tolist() for numbers in (rows, asked))
        places = asked - np.repeat(bounds[:-1], asked_counts)
        return PullLists(rows, send_counts, places, asked_counts, _merged([places]))


class StepReader:
    """Takes in what a step's slots read."""

    def __init__(self, share: Share):
        self.share = share
        self._own: list[Rows] = []
        self._asked: list[Rows] = []  # by others

    def add(self, reader: int, rows: Rows) -> None:
        """A slot of rank `reader` reads `rows` (k,)."""
        if reader == self.share.rank:
            self._own.append(rows)
        else:
            self._asked.append(np.sort(self._in_part(rows)) + (reader - self.share.rank) * self.share.part)

    def reads(self) -> StepReads:
        """Of all slots."""
        own = distinct(self._own)
        if self.share.size == 1:
            return StepReads(own, own)
        return StepReads(own, _merged([*self._asked, self._in_part(own)]))

    def _in_part(self, rows: Rows) -> Rows:
        first = self.share.rank * self.share.part
        return rows[(rows >= first) & (rows < first + self.share.part)]


def distinct(parts: Sequence[Rows], kind: Literal["quicksort", "stable"] = "quicksort") -> Rows:
    """The values of integer arrays, each (k,): sorted, each once. Many times faster than NumPy's `unique`."""
    values = np.sort(np.concatenate(parts), kind=kind) if parts else np.empty(0, dtype=np.int64)
    return np.concatenate((values[:1], values[1:][values[1:] != values[:-1]]))


def _merged(parts: Sequence[Rows]) -> Rows:
    """`distinct` of a few sorted runs: the stable sort merges them, several times faster than the other sorts."""
    return distinct(parts, "stable")
