"""A run's model from its newest checkpoint, for use, not for training."""

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
from nanogpt.training.implementations import choose_implementations
from nanogpt.training.ownership import owner_check
from nanogpt.training.schedule import Schedule
from nanogpt.training.separate_documents import EMPTY, MULTIPLE


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model with the weights and rotary tables of a checkpoint."""

    run: RunDirectory
    spec: RunSpec
    step: int  # steps done
    model: LanguageModel
    windows: Windows  # see `Schedule.windows_after`

    @property
    def masked(self) -> bool:
        """Whether it is from the end of a run whose last validation uses the canonical mask."""
        return self.spec.training.masked and self.step >= self.spec.training.total_steps

    @property
    def longest_stream(self) -> int:
        """The most tokens it can read at a time: the size of its rotary tables."""
        return max(self.spec.evaluation.micro_batch_tokens // MULTIPLE, 1) * MULTIPLE

    @property
    def longest(self) -> int:
        """The most tokens of a document it reads: as many as in training, with room for what precedes them."""
        spec = self.spec
        limit = spec.model.longest_document or spec.training.max_document_tokens
        return min(limit, spec.training.max_document_tokens, self.longest_stream - EMPTY)


def find_device(name: str | None) -> torch.device:
    """The device `name`, cpu or cuda; None: a GPU if there is one. Raises InputError for others, or without a GPU."""
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"--device: found {name}, expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: PyTorch sees no GPU here (apptainer needs --nv); leave it out to use the CPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def evaluating_implementations(spec: RunSpec, device: torch.device) -> Implementations:
    """The run's own if they can run here, else equivalent ones; 8-bit products are for training alone."""
    runtime = spec.runtime.model_copy(
        update=dict.fromkeys(("head_precision", "mlp_precision", "projection_precision"), "bf16")
    )
    try:
        return choose_implementations(spec.model_copy(update={"runtime": runtime}), device)[0]
    except InputError:
        runtime = runtime.model_copy(update={"attention": "auto"})
        return choose_implementations(spec.model_copy(update={"runtime": runtime}), device)[0]


def load_trained_model(
    run_directory: Path, *, device: torch.device | str = "cpu", implementations: Implementations | None = None
) -> TrainedModel:
    """The run's newest checkpoint as a model on `device`, in the run's dtype; `implementations` as in `build_model`.

    Raises:
        InputError: no run, no checkpoint, or none that is readable.
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
