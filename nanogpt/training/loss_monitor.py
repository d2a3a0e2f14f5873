"""What steps report (loss, waits) without making the host wait for the device, and the stop on a non-finite loss."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt.errors import RunError

MOST_AHEAD = 2  # steps the host may be ahead of the device


class SeenLoss(NamedTuple):
    """A step's training loss, per token, and how long it waited for data on the rank that waited longest."""

    step: int
    loss: float
    data_wait_ms: float = 0.0


class LossMonitor:
    """Takes each step's loss on the device and returns it once it has arrived on the host.

    It also keeps the host from running ahead: with steps launched as graphs it would soon be minutes ahead,
    deaf to signals and blind to non-finite losses.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._last_finite: SeenLoss | None = None

    def put(self, step: int, loss: Tensor) -> None:
        """Queue a loss, on any device: a scalar, or (1 + ranks,) the loss and each rank's wait for data in ms."""
        if loss.device.type != "cuda":
            self._waiting.append((step, loss, None))
            return
        arrived = torch.empty_like(loss, device="cpu", pin_memory=True)
        arrived.copy_(loss, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((step, arrived, event))

    def take(self, *, wait: bool = False) -> list[SeenLoss]:
        """Losses that have arrived since the last call; with `wait`, all of them.

        Raises `RunError`, naming the step, if one is not finite.
        """
        seen = []
        while self._waiting:
            step, loss, event = self._waiting[0]
            if event is not None and not event.query():
                if not wait and len(self._waiting) <= MOST_AHEAD:
                    break
                event.synchronize()
            self._waiting.popleft()
            value, *waits = loss.reshape(-1).tolist()
            if not math.isfinite(value):
                before = self._last_finite
                known = f"; the last finite one was {before.loss:.4f} at step {before.step}" if before else ""
                raise RunError(
                    f"step {step}: the training loss is {value}{known}. The run stops; its last checkpoint, if any,"
                    " is from before"
                )
            self._last_finite = SeenLoss(step, value, max(waits, default=0.0))
            seen.append(self._last_finite)
        return seen
