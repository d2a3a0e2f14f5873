"""Time in which this process ran: what counts towards a limit when a job may be suspended and continued."""

from __future__ import annotations

import time


class AwakeClock:
    """`time.monotonic()` minus the time that this process was stopped, which a loop that ticks often can tell."""

    def __init__(self) -> None:
        self._missed = 0.0
        self._ticked = time.monotonic()

    def now(self) -> float:
        """Seconds since some moment, correct up to the last `tick`; the next may still take some back."""
        return time.monotonic() - self._missed

    def tick(self, at_most_s: float) -> float:
        """`now`, counting at most `at_most_s` since the last tick."""
        at = time.monotonic()
        self._missed += max(0.0, at - self._ticked - at_most_s)
        self._ticked = at
        return at - self._missed
