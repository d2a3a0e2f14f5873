"""What happens at a run's end, before the last validation: the entries of `training.end`, in order.

Inside the clock. The last checkpoint has what they have left. Without entries nothing is kept and nothing is done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.spec import AverageWeights, RunSpec


class EndOfRun:
    """Follows the last steps of a run, and ends it."""

    def __init__(self, spec: RunSpec, model: nn.Module):
        self.total_steps = spec.training.total_steps
        self.entries = spec.training.end
        self.parameters = dict(model.named_parameters())
        self._sums: list[dict[str, Tensor]] = [{} for _ in self.entries]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The optimizer has made `step` (from 0)."""
        for entry, sums in zip(self.entries, self._sums, strict=True):
            if self.total_steps - step <= entry.last_steps:
                for name, parameter in self.parameters.items():
                    if name in sums:
                        sums[name].add_(parameter)
                    else:
                        sums[name] = parameter.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def finish(self) -> list[str]:
        """Apply the entries after the last step; what was done, a line each."""
        for entry, sums in zip(self.entries, self._sums, strict=True):
            for name, parameter in self.parameters.items():
                parameter.copy_(sums.pop(name).div_(entry.last_steps))
        return [describe(entry) for entry in self.entries]

    def state_dict(self) -> list[dict[str, Tensor]]:
        """The sums so far, by entry; the same on every rank. Tensors are not copied."""
        return self._sums

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over a `state_dict`."""
        self._sums = [
            {name: value.to(self.parameters[name].device) for name, value in sums.items()} for sums in state
        ] or [{} for _ in self.entries]


def describe(entry: AverageWeights) -> str:
    """An entry, for the log and the record."""
    return f"the mean of the weights after each of the last {entry.last_steps} steps"
