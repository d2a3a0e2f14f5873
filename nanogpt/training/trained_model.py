"""A run's model as its newest checkpoint has it, to be used and not to be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nanogpt.errors import InputError
from nanogpt.models.language_model import Implementations, LanguageModel, Windows
from nanogpt.runs.directory import RunDirectory
from nanogpt.spec import RunSpec
from nanogpt.training.build import build_model
from nanogpt.training.checkpoint import load_newest_checkpoint, taken_over
from nanogpt.training.ownership import owner_check
from nanogpt.training.schedule import Schedule


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model with the weights and rotary tables of a checkpoint."""

    run: RunDirectory
    spec: RunSpec
    step: int  # steps that it has made
    model: LanguageModel
    windows: Windows  # see `Schedule.windows_after`

    @property
    def masked(self) -> bool:
        """Whether it is a run's end whose validation has the canonical mask."""
        return self.spec.training.masked and self.step >= self.spec.training.total_steps


def load_trained_model(
    run_directory: Path, *, device: torch.device | str = "cpu", implementations: Implementations | None = None
) -> TrainedModel:
    """The model of the run's newest checkpoint on `device`, in the run's dtype; `implementations` as in `build_model`.

    Raises:
        InputError: no run there, no checkpoint in it, or none that can be read.
    """
    run = RunDirectory.open(run_directory)
    spec = run.spec()
    checkpoint = load_newest_checkpoint(run.checkpoint_directory, owner_check(run, spec, tell=False))
    if checkpoint is None:
        raise InputError(f"{run.path}: has no checkpoint; a run with checkpoint.at_end: true in its recipe writes one")
    model = build_model(spec, device=device, implementations=implementations)
    step = int(checkpoint["step"])
    with taken_over(run.checkpoint_directory):
        model.load_state_dict(checkpoint["model"])
        for name, table in model.tables.items():
            table.load_state_dict(checkpoint["optimizer"]["tables"][name])
        return TrainedModel(run, spec, step, model, Schedule(spec).windows_after(step))
