"""In place of CUDA graphs, where there is no GPU: a replay calls the function again with what it was captured with.

So whatever moves between calls, or is not written to where the graph reads it, gives other numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanogpt.captured import Captured


class CalledAgain:
    """Counts the replays of all."""

    replays = 0

    def __init__(self, function: Callable[..., None], args: tuple[Any, ...]):
        self.function = function
        self.args = args

    def replay(self) -> None:
        CalledAgain.replays += 1
        self.function(*self.args)


def instead_of_graphs(patch: pytest.MonkeyPatch) -> None:
    """Let `Captured` make these."""
    CalledAgain.replays = 0
    patch.setattr(Captured, "_capture", lambda self, args: CalledAgain(self.function, args))
