"""The run's clock: the sum of device time between synchronised starts and stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from nanogpt.launch.world import World


class Clock:
    """Milliseconds of training. Stopped for validation and checkpoints; continues a resumed run's time."""

    def __init__(self, world: World, elapsed_ms: float = 0.0):
        self.world = world
        self._before = elapsed_ms
        self._started: float | None = None

    @property
    def elapsed_ms(self) -> float:
        """Time so far. While it runs this is host time, ahead of the device by whatever is queued."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + 1000 * running

    def start(self) -> None:
        """Synchronise and continue."""
        self.world.synchronize()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Synchronise and halt."""
        self.world.synchronize()
        self._before, self._started = self.elapsed_ms, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop for whatever happens inside; after an error there, for good."""
        self.stop()
        yield
        self.start()
