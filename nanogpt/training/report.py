"""What a run reports while it runs: log lines, metrics records, the terminal's display.

Every rank watches the training loss, so that all stop together if it is not finite; only rank 0 writes.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.console import say
from nanogpt.launch.world import World
from nanogpt.runs.directory import RunDirectory
from nanogpt.runs.display import StepDisplay
from nanogpt.runs.reference import ReferenceWatch
from nanogpt.runs.tracker import tracker_for
from nanogpt.spec import RunSpec
from nanogpt.training.loss_monitor import LossMonitor
from nanogpt.training.schedule import Schedule, StepSettings


class Reporter:
    """Writes to `run`, if given, and to the terminal of rank 0. Counts are of steps done; times in milliseconds."""

    def __init__(
        self,
        spec: RunSpec,
        schedule: Schedule,
        world: World,
        run: RunDirectory | None,
        watch: ReferenceWatch | None = None,
    ):
        self.spec = spec
        self.schedule = schedule
        self.world = world
        self.run = run if world.is_main else None
        self.display = StepDisplay() if world.is_main else None
        self.watch = watch if world.is_main else None
        self.tracker = tracker_for(spec, self.run.path) if self.run else None
        self.monitor = LossMonitor()
        self.train_loss: float | None = None
        self._times: dict[int, dict[str, Any]] = {}  # by step, until the loss has arrived
        self._waits: list[tuple[float, int]] = []  # for data, in ms; the step

    def note(self, line: str) -> None:
        """Write a line to the log."""
        if self.run:
            self.run.log(line)

    def _metric(self, **record: Any) -> None:
        if self.run:
            self.run.metric(record)
        if self.tracker:
            self.tracker.metric(record)

    def start(self, first_step: int, *, resumed: bool) -> None:
        """Report that the clock is about to start, at `first_step`."""
        if self.display:
            self.display.start(self.schedule.total_steps, first_step)
        self._metric(
            kind="start",
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            name=self.spec.name,
            total_steps=self.schedule.total_steps,
            world_size=self.world.size,
            device=_device_name(self.world.device),
            resumed_at=first_step if resumed else None,
        )
        if resumed:
            self.note(f"resumed at step {first_step}")
        if self.watch and self.watch.note:
            self.note(self.watch.note)

    def step(self, settings: StepSettings, loss: Tensor, elapsed_ms: float) -> None:
        """Report that `settings.step` is done.

        `loss`, which may not be computed yet, has the training loss per token and the milliseconds that each rank
        waited for its batch, (1 + world size,), or the loss alone.

        Raises `RunError` if a loss that has arrived is not finite.
        """
        done = settings.step + 1
        average = elapsed_ms / done
        self._times[done] = {
            "stage": settings.stage,
            "train_time_ms": elapsed_ms,
            "step_avg_ms": average,
            "lr_factor": settings.rates.lr_factor,
        }
        self.monitor.put(done, loss)
        line = f"step:{done}/{self.schedule.total_steps} train_time:{elapsed_ms:.0f}ms step_avg:{average:.2f}ms"
        if done % self.spec.output.log_every == 0:
            self.note(line)
        self.take_losses()
        if self.display:
            self.display.step(done, line, self.train_loss)

    def take_losses(self, *, wait: bool = False) -> None:
        """Write the metrics of the steps whose losses have arrived. Raises `RunError` if one is not finite."""
        for step, loss, data_wait_ms in self.monitor.take(wait=wait):
            self.train_loss = loss
            self._waits.append((data_wait_ms, step))
            self._metric(
                kind="step",
                step=step,
                total_steps=self.schedule.total_steps,
                train_loss=loss,
                data_wait_ms=data_wait_ms,
                tokens=self.schedule.tokens_before(step),
                **self._times.pop(step),
            )

    def evaluation(self, step: int, val_loss: float, elapsed_ms: float) -> None:
        """Report the validation loss after `step` steps."""
        average = elapsed_ms / max(step, 1)
        line = (
            f"step:{step}/{self.schedule.total_steps} val_loss:{val_loss:.4f}"
            f" train_time:{elapsed_ms:.0f}ms step_avg:{average:.2f}ms"
        )
        comparison = self.watch.compare(step, val_loss) if self.watch else None
        beside = comparison.lines() if comparison else []
        for text in (line, *beside):
            self.note(text)
        self._metric(
            kind="evaluation",
            step=step,
            total_steps=self.schedule.total_steps,
            val_loss=val_loss,
            train_time_ms=elapsed_ms,
            step_avg_ms=average,
            tokens=self.schedule.tokens_before(step),
            **(comparison.fields() if comparison else {}),
        )
        if self.display:
            self.display.evaluation(step, "\n".join((line, *beside)), val_loss)

    def checkpoint(self, step: int, path: Path) -> None:
        """Report a complete checkpoint after `step` steps."""
        self.note(f"step:{step}/{self.schedule.total_steps} checkpoint:{path.name}")
        self._metric(kind="checkpoint", step=step, path=str(path))

    def checkpoint_failed(self, step: int, reason: str) -> None:
        """Report that the checkpoint after `step` steps could not be written, and the run continues."""
        line = f"step:{step}/{self.schedule.total_steps} no checkpoint: {reason}"
        if self.display:
            say(line)
        self.note(line)
        self._metric(kind="checkpoint_failure", step=step, reason=reason)

    def waits(self) -> None:
        """A line on how long steps waited for data, on the rank that waited longest."""
        if self._waits:
            longest, step = max(self._waits)
            mean = sum(wait for wait, _ in self._waits) / len(self._waits)
            self.note(
                f"data wait: {mean:.3f} ms per step on the slowest rank, at most {longest:.3f} ms, in step {step}"
            )

    def end(self, state: str, reason: str | None, elapsed_ms: float) -> None:
        """Report the end of the run: `state` is finished, failed or interrupted."""
        if self.display:  # first, as the disk may be full
            self.display.close()
        self._metric(kind="end", state=state, reason=reason, train_time_ms=elapsed_ms)
        self.note(f"run {state}" + (f": {reason}" if reason else ""))
        if self.tracker:
            self.tracker.close()
        if self.run:
            self.run.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
