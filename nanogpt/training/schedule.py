"""What holds at each step: stage, batch, windows, multi-token weights, learning rate, momentum, Adam steps, the split.

Pure functions of the spec and the step number; steps are 0-based. Whatever a stage sets holds from its first step on,
before that step's validation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from nanogpt.models.language_model import Windows
from nanogpt.optim.optimizer import StepRates
from nanogpt.spec import CooldownSchedule, CosineSchedule, RunSpec, SpeedrunOptimizerSpec, StageSpec, WindowBlocks


@dataclass(frozen=True)
class StepSettings:
    """One step's part of the schedule."""

    step: int
    stage: int  # index into TrainingSpec.all_stages
    batch_tokens: int
    windows: Windows
    token_weights: tuple[float, ...]
    prefix_weight: float | None  # of the next token's prefix; None where it is not predicted
    max_document_tokens: int
    max_documents: int | None  # room in a micro-batch; None: by its tokens
    rates: StepRates


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
        self.adam_every = spec.optimizer.adam.every if isinstance(spec.optimizer, SpeedrunOptimizerSpec) else 1

    def stage_of(self, step: int) -> int:
        """Index of the stage that `step` is in; the last stage for the step after the end."""
        return max(i for i, first in enumerate(self.first_steps) if first <= step)

    def at(self, step: int) -> StepSettings:
        """Everything the schedule says about `step`."""
        index = self.stage_of(step)
        stage = self.stages[index]
        return StepSettings(
            step=step,
            stage=index,
            batch_tokens=stage.batch_tokens,
            windows=self._tokens(stage.window_blocks),
            token_weights=self.token_weights(step),
            prefix_weight=self.prefix_weight(step),
            max_document_tokens=stage.max_document_tokens or self.training.max_document_tokens,
            max_documents=stage.max_documents,
            rates=StepRates(
                lr_factor=self.lr_factor(step),
                momentum=self.momentum(step),
                adam_step=self.is_adam_step(step),
                split=step == self.split_step,
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
        """Windows to use a model with that has made `step` steps: its last step's, at the end the last validation's.

        Not those of the next step, which may begin a stage that the rotary tables know nothing of.
        """
        return self.final_windows if step >= self.total_steps else self.at(max(step - 1, 0)).windows

    def window_changes(self, step: int) -> list[tuple[int, int]]:
        """(old, new) long windows in tokens of every change up to and including the first moment of `step`."""
        longs = [self._tokens(stage.window_blocks).long for stage in self.stages[: self.stage_of(step) + 1]]
        return [(old, new) for old, new in itertools.pairwise(longs) if old != new]

    def token_weights(self, step: int) -> tuple[float, ...]:
        """Weights of the next tokens; the last of several falls linearly to 0 over its stage."""
        index = self.stage_of(step)
        stage: StageSpec = self.stages[index]
        if len(stage.token_weights) == 1:
            return tuple(stage.token_weights)
        progress = (step - self.first_steps[index]) / stage.steps
        return (*stage.token_weights[:-1], stage.token_weights[-1] * (1 - progress))

    def prefix_weight(self, step: int) -> float | None:
        """Loss weight of the next token's prefix, linear within a stage."""
        index = self.stage_of(step)
        weight = self.stages[index].prefix_weight
        if weight is None:
            return None
        progress = (step - self.first_steps[index]) / self.stages[index].steps
        return weight.first + (weight.last - weight.first) * progress

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

    def momentum(self, step: int) -> float:
        """NorMuon's mu: up over the first steps, down over the last."""
        optimizer = self.spec.optimizer
        if not isinstance(optimizer, SpeedrunOptimizerSpec):
            return 0.0
        m = optimizer.normuon.momentum
        if step < m.warmup_steps:
            return m.low + (m.high - m.low) * step / m.warmup_steps
        cooldown = self.total_steps - m.cooldown_steps
        if step > cooldown:
            return m.high - (m.high - m.low) * (step - cooldown) / m.cooldown_steps
        return m.high

    def is_adam_step(self, step: int) -> bool:
        """Adam's parameters step on the last of every `adam.every` steps."""
        return step % self.adam_every == self.adam_every - 1

    @property
    def split_step(self) -> int | None:
        """The first Adam step of the split stage; itself still tied."""
        optimizer = self.spec.optimizer
        if not isinstance(optimizer, SpeedrunOptimizerSpec):
            return None
        step = self.first_steps[optimizer.tied_head.split_stage]
        while not self.is_adam_step(step):
            step += 1
        return step

    def warmup_steps(self) -> list[int]:
        """The steps that the warm-up runs: 0, 1, 2 and those around each stage change, as far as they exist."""
        around = {0, 1, 2}.union(*({first - 1, first, first + 1} for first in self.first_steps[1:]))
        return sorted(step for step in around if step < self.total_steps)
