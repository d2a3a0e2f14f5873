"""What the end of a run is worth: one run, its last weights, and other ends of it on the same validation tokens.

Ends of one run differ by nothing else, so that a difference of 0.0005 is seen where two runs would have to be many.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.console import markdown_table
from nanogpt.errors import InputError
from nanogpt.models.language_model import Windows
from nanogpt.runs.directory import RunDirectory, write_whole
from nanogpt.spec import RunSpec
from nanogpt.training.schedule import StepSettings
from nanogpt.training.trainer import Result, Trainer, train_run

ENDS_NAME = "ends.json"

End = tuple[str, float]  # what differs, validation loss


@dataclass(frozen=True)
class Ends:
    """Which ends are evaluated besides the last weights."""

    averages: Sequence[int] = ()  # the mean of the weights that each of the last so many steps has left, in fp32
    before: Sequence[int] = ()  # the weights of so many steps before the end
    windows: Sequence[tuple[int, int]] = ()  # the last weights with other windows, short and long, in blocks

    def check(self, total_steps: int) -> None:
        """Raises `InputError` for more steps than the run has."""
        for count in self.averages:
            if not 1 <= count <= total_steps:
                raise InputError(f"--average {count}: expected 1 to the {total_steps} steps of the run")
        for count in self.before:
            if not 0 <= count < total_steps:
                raise InputError(f"--before {count}: expected 0 to one less than the {total_steps} steps of the run")


def train_with_ends(spec: RunSpec, ends: Ends, *, run: RunDirectory | None, data_directory: Path) -> list[End]:
    """An ordinary run, then the other ends, with the windows of the last validation. Every rank calls it.

    The averages are added up inside the clock: some milliseconds a step, of the last steps. Returns the last weights'
    loss and the others' on the rank that has the run's directory, where they are in `ENDS_NAME` too; else nothing.
    Raises as `train_run` does.
    """
    train_run(spec, run=run, data_directory=data_directory, make_trainer=functools.partial(TrainerWithEnds, ends=ends))
    if run is None:
        return []
    return [(name, loss) for name, loss in json.loads((run.path / ENDS_NAME).read_text())]


def ends_table(ends: Sequence[End]) -> list[str]:
    """As Markdown, against the first."""
    last = ends[0][1]
    rows = [(name, f"{loss:.4f}", f"{loss - last:+.4f}") for name, loss in ends]
    return markdown_table(("end of the run", "validation loss", "against the last weights"), rows)


class TrainerWithEnds(Trainer):
    """A trainer that evaluates other ends when its run has ended, and writes them into `ENDS_NAME`."""

    def __init__(self, *arguments: Any, ends: Ends, **options: Any):
        super().__init__(*arguments, **options)
        self.ends = ends
        self.sums: dict[int, list[Tensor]] = {}
        self.copies: dict[int, list[Tensor]] = {}

    def train_step(self, settings: StepSettings, micro_steps: int | None = None) -> Tensor:
        """A step; where it is one of the last, its weights are added up, or kept."""
        told = super().train_step(settings, micro_steps)
        if micro_steps is not None:  # the warm-up
            return told
        left = self.schedule.total_steps - settings.step
        for count in self.ends.averages:
            if left <= count:
                if count not in self.sums:
                    self.sums[count] = [torch.zeros_like(p, dtype=torch.float32) for p in self.model.parameters()]
                for total, parameter in zip(self.sums[count], self.model.parameters(), strict=True):
                    total.add_(parameter.detach())
        if left - 1 in self.ends.before:
            self.copies[left - 1] = self._weights()
        return told

    def run(self, *, resume: bool = False) -> Result:
        """The run, then the other ends."""
        if resume:
            raise ValueError("the weights of steps before a resumption are gone")
        result = super().run()
        with self.watch.phase("evaluating other ends"):
            found = [("the last weights", result.final_val_loss), *self._reweighted(), *self._windowed()]
        if self.run_directory is not None:
            write_whole(self.run_directory.path / ENDS_NAME, json.dumps(found, indent=1) + "\n")
        return result

    def _reweighted(self) -> list[End]:
        last, found = self._weights(), []
        for count in self.ends.averages:
            self._put([total / count for total in self.sums[count]])
            found.append((f"mean of the last {count}", self._loss(self.schedule.final_windows)))
        for count in self.ends.before:
            self._put(self.copies[count])
            found.append((f"{count} steps before", self._loss(self.schedule.final_windows)))
        self._put(last)
        return found

    def _loss(self, windows: Windows) -> float:
        """As the last validation computes it."""
        return self.evaluate(windows, self.end_of_run.mask)

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def _windowed(self) -> list[End]:
        block = self.spec.training.window_block
        return [
            (f"windows of {short} and {long} blocks", self._loss(Windows(block * short, block * long)))
            for short, long in self.ends.windows
        ]

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(weight)
