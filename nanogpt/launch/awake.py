"""Time in which this process ran: what counts against a limit where a job may be suspended and continued."""

from __future__ import annotations

import time


class AwakeClock:
    """`time.monotonic()` less the time that this process stood still, which a loop that ticks often finds out."""

    def __init__(self) -> None:
        self._missed = 0.0
        self._ticked = time.monotonic()

    def now(self) -> float:
        """Seconds, since some moment. Right up to the last `tick`, which may still take some back."""
        return time.monotonic() - self._missed

    def tick(self, at_most_s: float) -> float:
        """`now`, where no more than `at_most_s` has passed since the last tick: the rest does not count."""
        at = time.monotonic()
        self._missed += max(0.0, at - self._ticked - at_most_s)
        self._ticked = at
        return at - self._missed
