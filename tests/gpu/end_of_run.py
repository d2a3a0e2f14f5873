"""What the end of a run is worth: one run, its last weights, and other ends of it on the same validation tokens.

    python tests/gpu/end_of_run.py RECIPE --data DIR --out DIR [--on 1xh100] [--steps N] [--set KEY=VALUE]... \
        [--average 8 16 32] [--before 4 8 16] [--windows 6:20 6:28]

The run is an ordinary one, in a directory of its own. `--average N` evaluates the mean of the weights that each of the
last N steps has left, kept in fp32; `--before N` the weights of N steps before the end; `--windows SHORT:LONG` the last
weights with other attention windows, in blocks. All others with those of the last validation. Ends of one run differ by
nothing else, so that a difference of 0.0005 is seen where two runs would have to be many. The averages are added up
inside the clock: some milliseconds a step, of the last steps. On several GPUs:

    torchrun --standalone --nproc-per-node N tests/gpu/end_of_run.py RECIPE ...
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.cluster.at_hand import at_hand
from nanogpt.console import markdown_table
from nanogpt.launch.world import started_as
from nanogpt.models.language_model import Windows
from nanogpt.recipe import load_recipe
from nanogpt.training.recorder import create_run
from nanogpt.training.schedule import StepSettings
from nanogpt.training.trainer import Result, Trainer, train_run

ENDS = "ends.json"

End = tuple[str, float]  # what differs, validation loss


class EndOfRun(Trainer):
    """A trainer that evaluates other ends when its run has ended, and writes them into `ends.json`.

    `averages`: over the last so many steps. `before`: steps before the end. `windows`: (short, long), in blocks.
    """

    def __init__(
        self,
        *arguments: Any,
        averages: Sequence[int] = (),
        before: Sequence[int] = (),
        windows: Sequence[tuple[int, int]] = (),
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        self.averages = averages
        self.before = before
        self.windows = windows
        self.sums: dict[int, list[Tensor]] = {}
        self.copies: dict[int, list[Tensor]] = {}

    def train_step(self, settings: StepSettings, micro_steps: int | None = None) -> Tensor:
        """A step; where it is one of the last, its weights are added up, or kept."""
        told = super().train_step(settings, micro_steps)
        if micro_steps is not None:  # the warm-up
            return told
        left = self.schedule.total_steps - settings.step
        for count in self.averages:
            if left <= count:
                if count not in self.sums:
                    self.sums[count] = [torch.zeros_like(p, dtype=torch.float32) for p in self.model.parameters()]
                for total, parameter in zip(self.sums[count], self.model.parameters(), strict=True):
                    total.add_(parameter.detach())
        if left - 1 in self.before:
            self.copies[left - 1] = self._weights()
        return told

    def run(self, *, resume: bool = False) -> Result:
        """The run, then the other ends."""
        if resume:
            raise ValueError("the weights of steps before a resumption are gone")
        result = super().run()
        ends = [("the last weights", result.final_val_loss), *self._reweighted(), *self._windowed()]
        if self.run_directory is not None:
            (self.run_directory.path / ENDS).write_text(json.dumps(ends, indent=1) + "\n")
        return result

    def _reweighted(self) -> list[End]:
        last, found = self._weights(), []
        for count in self.averages:
            self._put([total / count for total in self.sums[count]])
            found.append((f"mean of the last {count}", self.evaluate(self.schedule.final_windows)))
        for count in self.before:
            self._put(self.copies[count])
            found.append((f"{count} steps before", self.evaluate(self.schedule.final_windows)))
        self._put(last)
        return found

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def _windowed(self) -> list[End]:
        block = self.spec.training.window_block
        return [
            (f"windows of {short} and {long} blocks", self.evaluate(Windows(block * short, block * long)))
            for short, long in self.windows
        ]

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(weight)


def blocks(text: str) -> tuple[int, int]:
    """(6, 20) of "6:20"."""
    short, long = text.split(":")
    return int(short), int(long)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--on", metavar="[NODESx]GPUSxTYPE")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--average", type=int, nargs="*", default=[])
    parser.add_argument("--before", type=int, nargs="*", default=[])
    parser.add_argument("--windows", type=blocks, nargs="*", default=[])
    chosen = parser.parse_args(arguments)
    spec = load_recipe(chosen.recipe, chosen.overrides, steps=chosen.steps, on=chosen.on, fill=at_hand(os.environ))
    if not all(1 <= count <= spec.training.total_steps for count in chosen.average):
        parser.error(f"--average: from 1 to the {spec.training.total_steps} steps of the run")
    if not all(0 <= count < spec.training.total_steps for count in chosen.before):
        parser.error(f"--before: from 0 to one less than the {spec.training.total_steps} steps of the run")
    rank, *_ = started_as()
    run = create_run(chosen.out, spec) if rank == 0 else None
    make = functools.partial(EndOfRun, averages=chosen.average, before=chosen.before, windows=chosen.windows)
    train_run(spec, run=run, data_directory=chosen.data, make_trainer=make)
    if run is None:
        return
    ends: list[End] = json.loads((run.path / ENDS).read_text())
    last = ends[0][1]
    rows = [(name, f"{loss:.4f}", f"{loss - last:+.4f}") for name, loss in ends]
    print("\n".join(markdown_table(("end of the run", "validation loss", "against the last weights"), rows)))


if __name__ == "__main__":
    main()
