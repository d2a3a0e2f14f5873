"""The settings of each step: stage, batch, windows, learning rate, and the model's and optimizer's own.

Pure functions of the spec and the step number; steps are 0-based. A stage's settings hold from its first step,
and already for the validation before it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from nanogpt.data.training_batches import StepRequest
from nanogpt.models.language_model import SchedulePoint, Windows
from nanogpt.spec import CooldownSchedule, CosineSchedule, RunSpec, WindowBlocks


@dataclass(frozen=True)
class StepSettings:
    """One step's part of the schedule."""

    point: SchedulePoint  # from which the model makes the loss's inputs
    request: StepRequest  # from which the loader makes the step
    rates: Any  # the optimizer's own

    @property
    def step(self) -> int:
        """0-based."""
        return self.point.step

    @property
    def batch_tokens(self) -> int:
        """Over all ranks and micro-steps."""
        return self.request.batch_tokens

    @property
    def stage(self) -> int:
        """Index into TrainingSpec.all_stages."""
        return self.point.stage

    @property
    def windows(self) -> Windows:
        """In tokens."""
        return self.point.windows


class Schedule:
    """The schedule of a run. `at(step)` answers for 0 <= step < total_steps."""

    def __init__(self, spec: RunSpec):
        self.spec = spec
        self.training = spec.training
        self.stages = spec.training.all_stages
        self.total_steps = spec.training.total_steps
        first, self.first_steps = 0, []
        for stage in self.stages:
            self.first_steps.append(first)
            first += stage.steps

    def stage_of(self, step: int) -> int:
        """Index of the stage that `step` is in; the last stage for the step after the end."""
        return max(i for i, first in enumerate(self.first_steps) if first <= step)

    def at(self, step: int) -> StepSettings:
        """Everything the schedule says about `step`."""
        index = self.stage_of(step)
        stage = self.stages[index]
        progress = (step - self.first_steps[index]) / stage.steps
        return StepSettings(
            point=SchedulePoint(step, index, progress, self._tokens(stage.window_blocks), stage),
            request=StepRequest(
                batch_tokens=stage.batch_tokens,
                max_document_tokens=stage.max_document_tokens or self.training.max_document_tokens,
                max_documents=stage.max_documents,
                loss=stage,
                max_segment_tokens=stage.max_segment_tokens,
            ),
            rates=self.spec.optimizer.rates(
                step, self.lr_factor(step), first_steps=self.first_steps, total_steps=self.total_steps
            ),
        )

    def tokens_before(self, step: int) -> int:
        """Tokens trained on before `step`."""
        return sum(
            stage.batch_tokens * min(max(step - first, 0), stage.steps)
            for stage, first in zip(self.stages, self.first_steps, strict=True)
        )

    def _tokens(self, blocks: WindowBlocks) -> Windows:
        return Windows(blocks.short * self.training.window_block, blocks.long * self.training.window_block)

    @property
    def final_windows(self) -> Windows:
        """Windows of the last validation."""
        return self._tokens(self.training.final_window_blocks)

    def windows_after(self, step: int) -> Windows:
        """Windows for using a model after `step` steps: those of its last step, or at the end of the last validation.

        Not those of the next step, which may begin a stage that the rotary tables do not yet reflect.
        """
        return self.final_windows if step >= self.total_steps else self.at(max(step - 1, 0)).windows

    def window_changes(self, step: int) -> list[tuple[Windows, Windows]]:
        """(old, new) windows at every change of either, up to and including the start of `step`."""
        windows = [self._tokens(stage.window_blocks) for stage in self.stages[: self.stage_of(step) + 1]]
        return [(old, new) for old, new in itertools.pairwise(windows) if old != new]

    def lr_factor(self, step: int) -> float:
        """What every base learning rate is multiplied by."""
        schedule = self.training.lr_schedule
        if isinstance(schedule, CosineSchedule):
            if step < schedule.warmup_steps:
                return (step + 1) / schedule.warmup_steps
            progress = (step - schedule.warmup_steps) / max(1, self.total_steps - schedule.warmup_steps)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            return schedule.end_factor + (1 - schedule.end_factor) * cosine
        return self._cooldown_factor(step, schedule)

    def _cooldown_factor(self, step: int, schedule: CooldownSchedule) -> float:
        scheduled = self.training.scheduled_steps
        if step >= scheduled:
            return schedule.end_factor
        index = self.stage_of(step)
        factor = self.stages[index].lr_factor
        if index > 0:
            ramp = min(1, (step - self.first_steps[index] + 1) / (schedule.ramp_steps + 1))
            factor = self.stages[index - 1].lr_factor * (1 - ramp) + factor * ramp
        start = int(scheduled * schedule.cooldown_start)
        if step < start:
            return factor
        t = (step - start) / (scheduled - start)
        return factor * (1 - t) + schedule.end_factor * t

    def warmup_steps(self) -> list[int]:
        """The steps that the warm-up runs: 0, 1, 2, those around stage changes, and the optimizer's, if they exist."""
        around = {0, 1, 2}.union(*({first - 1, first, first + 1} for first in self.first_steps[1:]))
        around |= set(self.spec.optimizer.warmup_steps(self.first_steps))
        return sorted(step for step in around if step < self.total_steps)
