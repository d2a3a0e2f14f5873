"""The communication plan: who owns what part of a parameter, and in which order reductions start and updates run.

Data only. The update formulas know nothing of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from nanogpt.optim.normuon_adam.spec import NorMuonAdamSpec
from nanogpt.optim.optimizer import Rates
from nanogpt.parameters import Parameter


@dataclass(frozen=True)
class NorMuonAdamRates(Rates):
    """The schedule's say in a step."""

    momentum: float = 0.0  # NorMuon's mu
    adam_step: bool = True  # Adam's parameters step too; otherwise their gradients keep accumulating
    split: bool = False  # after this step the embedding and the head train apart


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is trained."""

    label: str
    sharded: bool  # reduce-scatter, update the own shard, all-gather; else all-reduce and update everywhere
    bank: bool  # NorMuon, every step; else Adam, on Adam steps
    delayed: bool = False  # reduced at the end of an Adam step, updated in the step after it


@dataclass(frozen=True)
class StepPlan:
    """The parameters of one optimizer step, in the order of reduction and in the order of update.

    `delayed` are in neither: their reductions start when all else of the step is on its way.
    """

    reduce: tuple[ParameterPlan, ...]
    update: tuple[ParameterPlan, ...]
    delayed: tuple[ParameterPlan, ...]


def updated_together(plans: Sequence[ParameterPlan]) -> list[tuple[ParameterPlan, ...]]:
    """The updates in their order, those of Adam's unsharded parameters that follow one another as one.

    These are small, and have nothing to send after their update that would be worth starting early.
    """
    found: list[tuple[ParameterPlan, ...]] = []
    for small, group in itertools.groupby(plans, key=lambda plan: not plan.bank and not plan.sharded):
        run = tuple(group)
        found += [run] if small else [(plan,) for plan in run]
    return found


def parameter_plans(spec: NorMuonAdamSpec) -> dict[str, ParameterPlan]:
    """Every parameter's plan by label."""
    banks = {
        label: ParameterPlan(label, group.communication == "sharded", bank=True)
        for label, group in spec.normuon.groups.items()
    }
    adam = {
        label: ParameterPlan(label, group.communication == "sharded", bank=False, delayed=label in spec.adam.delayed)
        for label, group in spec.adam.groups.items()
    }
    return banks | adam


def step_plan(spec: NorMuonAdamSpec, *, adam_step: bool, tied: str | None) -> StepPlan:
    """What a step works on: banks always, Adam's parameters on Adam steps, the one that is `tied` not at all."""
    plans = parameter_plans(spec)

    def chosen(order: list[str], *, delayed: bool = False) -> tuple[ParameterPlan, ...]:
        found = (plans[label] for label in order if label != tied)
        return tuple(plan for plan in found if plan.delayed == delayed and (plan.bank or adam_step))

    return StepPlan(chosen(spec.reduce_order), chosen(spec.update_order), chosen(spec.reduce_order, delayed=True))


def tied_pair(rows: Sequence[Parameter]) -> tuple[str, str] | None:
    """(the parameter that is another's transpose, that one), if the table has such."""
    return next(((row.name, row.tied_to) for row in rows if row.tied_to), None)


def compiled_updates(spec: NorMuonAdamSpec, rows: Sequence[Parameter]) -> list[list[str]]:
    """The labels of each update in any kind of step, whatever the order of the updates."""
    pair = tied_pair(rows)
    plans = [
        step_plan(spec, adam_step=adam_step, tied=tied)
        for adam_step in (False, True)
        for tied in {None, pair[0] if pair else None}
    ]
    found = {tuple(p.label for p in together) for plan in plans for together in updated_together(plan.update)}
    found |= {(p.label,) for plan in plans for p in plan.delayed}
    return [list(labels) for labels in sorted(found)]
