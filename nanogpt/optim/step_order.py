"""The communication plan: who owns what part of a parameter, and in which order reductions start and updates run.

Data only. The update formulas know nothing of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is trained."""

    label: str
    sharded: bool  # reduce-scatter, update the own shard, all-gather; else all-reduce and update everywhere
    bank: bool  # NorMuon, every step; else Adam, on Adam steps
    cyclic: bool = False  # Adam at the events of tables of rows instead

    def due(self, *, adam_step: bool, event: bool) -> bool:
        """Whether such a step updates it; else its gradient keeps accumulating."""
        return self.bank or (event if self.cyclic else adam_step)


@dataclass(frozen=True)
class StepPlan:
    """The parameters of one optimizer step, in the order of reduction and in the order of update."""

    reduce: tuple[ParameterPlan, ...]
    update: tuple[ParameterPlan, ...]


def updated_together(plans: Sequence[ParameterPlan]) -> list[tuple[ParameterPlan, ...]]:
    """The updates in their order, those of Adam's unsharded parameters that follow one another as one.

    These are small, and have nothing to send after their update that would be worth starting early.
    """
    found: list[tuple[ParameterPlan, ...]] = []
    for small, group in itertools.groupby(plans, key=lambda plan: not plan.bank and not plan.sharded):
        run = tuple(group)
        found += [run] if small else [(plan,) for plan in run]
    return found
