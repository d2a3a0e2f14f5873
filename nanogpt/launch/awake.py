"""Time in which this process ran: what counts towards a limit when a job may be suspended and continued."""

from __future__ import annotations

import threading
import time


class AwakeClock:
    """`time.monotonic()` minus the time that this process was stopped: whatever passes between two looks at the clock
    beyond `stood_still_s`. So somebody has to look at it more often than that. For any threads.
    """

    def __init__(self, stood_still_s: float) -> None:
        self._stood_still_s = stood_still_s
        self._lock = threading.Lock()
        self._missed = 0.0
        self._looked = time.monotonic()

    def now(self) -> float:
        """Seconds since some moment."""
        with self._lock:
            at = time.monotonic()
            self._missed += max(0.0, at - self._looked - self._stood_still_s)
            self._looked = at
            return at - self._missed

    def keep(self, every_s: float, until: threading.Event) -> None:
        """Look at it so often: for a thread of its own, beside others that may wait for longer."""
        while not until.wait(every_s):
            self.now()
