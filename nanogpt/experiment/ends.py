"""What the end of a run is worth: one run, its last weights, and other ends of it on the same validation tokens.

Ends of one run differ in nothing else, so a difference of 0.0005 shows that would otherwise take many runs to see.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.console import markdown_table
from nanogpt.data.shards import read_count
from nanogpt.errors import InputError
from nanogpt.models.language_model import Windows
from nanogpt.runs.directory import RunDirectory, write_whole
from nanogpt.spec import RunSpec
from nanogpt.training.end_of_run import lerp
from nanogpt.training.schedule import StepSettings
from nanogpt.training.trainer import Result, Trainer, find_files, train_run

ENDS_NAME = "ends.json"
LAST = "the last weights"
LEFT = "what the last step has left"
VALIDATION = "validation"

End = tuple[str, dict[str, float]]  # what differs; loss by validation set
Weights = list[Tensor]  # of all parameters, in the model's order


@dataclass(frozen=True)
class Ends:
    """Which ends are evaluated besides the last weights, and on which further validation sets all of them are.

    Blends cover the grid of `blends` and `horizons`: `(1 - blend) w + blend average`, with the Frobenius norms of `w`
    for matrices, where `w` are the weights that the last step left and `average` is a running one in fp32 over the
    last `horizon` steps: the first of them copied, then each with the rate 2 / (horizon + 1).
    """

    before: Sequence[int] = ()  # the weights of N steps before the end
    windows: Sequence[tuple[int, int]] = ()  # the last weights with other windows, short and long, in blocks
    horizons: Sequence[int] = ()  # of running averages, in steps
    blends: Sequence[float] = ()
    blended: Sequence[str] = ()  # the parameters that are blended; all if none is named
    validations: Mapping[str, Path] = field(default_factory=dict)  # directories of shards by name

    def check(self, spec: RunSpec) -> None:
        """Raises `InputError` for steps that the run lacks, parameters that the model lacks, or missing shards."""
        total_steps = spec.training.total_steps
        for horizon in self.horizons:
            if not 1 <= horizon <= total_steps:
                raise InputError(f"--horizon {horizon}: expected 1 to the {total_steps} steps of the run")
        for count in self.before:
            if not 0 <= count < total_steps:
                raise InputError(f"--before {count}: expected 0 to one less than the {total_steps} steps of the run")
        for blend in self.blends:
            if not 0 < blend <= 1:
                raise InputError(f"--blend {blend:g}: expected a number above 0, at most 1")
        if bool(self.horizons) != bool(self.blends):
            raise InputError("--horizon, --blend: give both or neither, since each blend is of each horizon's average")
        names = [row.name for row in spec.model.parameters()]
        for name in self.blended:
            if name not in names:
                raise InputError(f"--blended {name}: the model has no such parameter; it has {', '.join(names)}")
        for name, directory in self.validations.items():
            if name == VALIDATION:
                raise InputError(f"--validate {name}={directory}: the run's own set has this name; choose another")
            tokens_of(find_files(directory, spec.data.val_files), spec)


def train_with_ends(spec: RunSpec, ends: Ends, *, run: RunDirectory | None, data_directory: Path) -> list[End]:
    """An ordinary run, then the other ends, with the windows of the last validation. Every rank calls it.

    Running averages are fed within the timed part: some milliseconds per step at the end. Returns the last weights'
    losses and the others' on the rank that has the run's directory, where they are in `ENDS_NAME` too; else nothing.
    Raises as `train_run` does.
    """
    train_run(spec, run=run, data_directory=data_directory, make_trainer=functools.partial(TrainerWithEnds, ends=ends))
    return [] if run is None else read_ends(run.path)


def read_ends(run: Path) -> list[End]:
    """The ends in a run's directory; empty if there are none."""
    try:
        return [(name, losses) for name, losses in json.loads((run / ENDS_NAME).read_text())]
    except FileNotFoundError:
        return []


def ends_table(ends: Sequence[End]) -> list[str]:
    """As Markdown, each against the first."""
    last = ends[0][1]
    head = ["end of the run"]
    for name in last:
        head += [f"{name} loss", "against the last weights"]
    rows = []
    for name, losses in ends:
        cells = [name]
        for of_set, loss in losses.items():
            cells += [f"{loss:.4f}", f"{loss - last[of_set]:+.4f}"]
        rows.append(cells)
    return markdown_table(head, rows)


def tokens_of(files: Sequence[Path], spec: RunSpec) -> int:
    """How many tokens of a further validation set are evaluated: as many as of the run's own, or all there are.

    Raises `InputError` for too few to fill a group of micro-batches.
    """
    group = spec.training.slots * spec.evaluation.micro_batch_tokens
    held = sum(map(read_count, files))
    tokens = min(spec.evaluation.tokens, (held - 1) // group * group)
    if tokens < group:
        raise InputError(
            f"{files[0].parent}: {held:,} tokens, and {group + 1:,} are needed: {spec.training.slots} micro-batches"
            f" of {spec.evaluation.micro_batch_tokens:,} (evaluation.micro_batch_tokens), and a last target"
        )
    return tokens


class TrainerWithEnds(Trainer):
    """A trainer that evaluates other ends after its run, and writes them into `ENDS_NAME`."""

    def __init__(self, spec: RunSpec, *arguments: Any, ends: Ends, **options: Any):
        super().__init__(spec, *arguments, **options)
        self.ends = ends
        self.copies: dict[int, Weights] = {}  # by steps before the end
        self.running: dict[int, dict[int, Tensor]] = {}  # by horizon, then by the parameter's place
        self.sets = {VALIDATION: self.val_batches}
        for name, directory in ends.validations.items():
            files = find_files(directory, spec.data.val_files)
            self.sets[name] = self.validation_batches(files, tokens_of(files, spec))
        names = [name for name, _ in self.model.named_parameters()]
        self.blended = [place for place, name in enumerate(names) if not ends.blended or name in ends.blended]

    def train_step(self, settings: StepSettings, micro_steps: int | None = None) -> Tensor:
        """A step; if it is one of the last, its weights are averaged or kept."""
        reported = super().train_step(settings, micro_steps)
        if micro_steps is None:  # not the warm-up
            self._keep(self.schedule.total_steps - settings.step)
        return reported

    @torch.no_grad()
    def _keep(self, left: int) -> None:
        """left: the steps that the run still had to make, including this one."""
        parameters = list(self.model.parameters())
        for horizon in self.ends.horizons:
            if left == horizon:
                self.running[horizon] = {place: parameters[place].float().clone() for place in self.blended}
            elif left < horizon:
                for place, average in self.running[horizon].items():
                    average.lerp_(parameters[place].float(), 2 / (horizon + 1))
        if left - 1 in self.ends.before or (left == 1 and self.ends.horizons):
            self.copies[left - 1] = self._weights()

    def run(self, *, resume: bool = False) -> Result:
        """The run, then the other ends."""
        if resume:
            raise ValueError("the weights of steps before a resumption are gone")
        result = super().run()
        with self.watch.phase("evaluating other ends"):
            last = {VALIDATION: result.final_val_loss}
            last |= {name: self._loss(name, self.schedule.final_windows) for name in self.sets if name != VALIDATION}
            found = [(LAST, last), *self._unmasked(LAST), *self._reweighted(), *self._windowed()]
        if self.run_directory is not None:
            write_whole(self.run_directory.path / ENDS_NAME, json.dumps(found, indent=1) + "\n")
        return result

    def _reweighted(self) -> list[End]:
        last, found = self._weights(), []
        for name, weights in self._other_weights():
            self._put(weights)
            found.append((name, self._losses(self.schedule.final_windows)))
            if name == LEFT:
                found += self._unmasked(name)
        self._put(last)
        return found

    def _other_weights(self) -> Iterator[tuple[str, Weights]]:
        for count in self.ends.before:
            yield f"{count} steps before", self.copies[count]
        if self.ends.horizons and any(any(entry.averaged()) for entry in self.spec.training.end):
            yield LEFT, self.copies[0]
        for horizon in self.ends.horizons:
            for blend in self.ends.blends:
                weights = list(self.copies[0])
                for place, average in self.running[horizon].items():
                    weights[place] = blended(weights[place], average, blend)
                yield f"{blend:g} of the average over {horizon}", weights

    def _loss(self, name: str, windows: Windows, *, masked: bool = True) -> float:
        """The loss on one of the sets, as the last validation computes it."""
        self.val_batches = self.sets[name]
        try:
            return self.evaluate(windows, self.end_of_run.mask if masked else None)
        finally:
            self.val_batches = self.sets[VALIDATION]

    def _unmasked(self, name: str) -> list[End]:
        """The weights in place without the run's mask, if it has one."""
        if self.end_of_run.mask is None:
            return []
        return [(f"{name}, without the mask", self._losses(self.schedule.final_windows, masked=False))]

    def _losses(self, windows: Windows, *, masked: bool = True) -> dict[str, float]:
        return {name: self._loss(name, windows, masked=masked) for name in self.sets}

    def _weights(self) -> Weights:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def _windowed(self) -> list[End]:
        block = self.spec.training.window_block
        return [
            (f"windows of {short} and {long} blocks", self._losses(Windows(block * short, block * long)))
            for short, long in self.ends.windows
        ]

    @torch.no_grad()
    def _put(self, weights: Weights) -> None:
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(weight)


def blended(last: Tensor, average: Tensor, blend: float) -> Tensor:
    """`(1 - blend) last + blend average` in fp32, of matrices with the Frobenius norm of `last`."""
    mixed = lerp(last.float(), average, blend)
    if last.ndim < 2:
        return mixed
    before, after = (torch.linalg.vector_norm(each, dtype=torch.float32) for each in (last, mixed))
    return mixed * torch.where(after > 0, before / after, 1.0)
