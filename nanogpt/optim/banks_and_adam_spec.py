"""The spec of optimizers with banks of matrices and Adam side by side, its checks and its schedule. No torch.

Each optimizer updates the banks in its own way: a part of its spec, named by `bank_part`.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from nanogpt.optim.optimizer_spec import BaseOptimizerSpec, Rates
from nanogpt.optim.step_order import ParameterPlan, StepPlan, updated_together
from nanogpt.parameters import Adam, NorMuon, Parameter
from nanogpt.spec_fields import (
    NOT_COMPILED,
    Beta,
    Betas,
    Count,
    Index,
    Name,
    Names,
    NonNegative,
    Polynomial,
    Positive,
    Problem,
    Strict,
)

Communication = Literal["replicated", "sharded"]


class AdamGroup(Strict):
    """Adam's settings for one parameter."""

    betas: Betas
    lr_mul: Annotated[Positive, NOT_COMPILED]
    wd_mul: Annotated[NonNegative, NOT_COMPILED]
    communication: Communication


class AdamSpec(Strict):
    """Adam with cautious weight decay, for everything that is not a bank of matrices."""

    lr: Annotated[Positive, NOT_COMPILED]
    eps: Positive
    weight_decay: Annotated[NonNegative, NOT_COMPILED]
    every: Annotated[Count, NOT_COMPILED] = Field(
        description="Adam steps on the last of every N steps; gradients are summed over them"
    )
    groups: dict[Name, AdamGroup] = Field(default={}, max_length=1024)


class MomentumSpec(Strict):
    """The banks' momentum: `low` to `high` over the first warmup_steps, back to `low` over the last cooldown_steps."""

    low: Annotated[Beta, NOT_COMPILED]
    high: Annotated[Beta, NOT_COMPILED]
    warmup_steps: Annotated[Index, NOT_COMPILED]
    cooldown_steps: Annotated[Index, NOT_COMPILED]


class BankGroup(Strict):
    """Settings for one bank of matrices."""

    lr_muls: Annotated[list[NonNegative], NOT_COMPILED] = Field(
        min_length=1,
        max_length=1024,
        description="multipliers of the bank's matrices, repeated in turn; 0 freezes: neither step nor decay",
    )
    communication: Communication


class BanksSpec(Strict):
    """Momentum, Polar Express, variance reduction by row, cautious decay."""

    lr: Annotated[Positive, NOT_COMPILED]
    beta2: Beta
    weight_decay: Annotated[NonNegative, NOT_COMPILED]
    momentum: MomentumSpec
    norm_margin: Positive = Field(description="the matrix is first divided by this times its Frobenius norm")
    polar_express: list[Polynomial] = Field(
        min_length=1, max_length=100, description="(a, b, c) of each iteration X <- aX + (bA + cAA)X, A = XX^T"
    )
    groups: dict[Name, BankGroup] = Field(default={}, max_length=1024)


class TiedHeadSpec(Strict):
    """The embedding is the head transposed until they split after the first Adam step of a stage."""

    split_stage: Annotated[Index, NOT_COMPILED]


@dataclass(frozen=True)
class BanksAndAdamRates(Rates):
    """A step's part of the schedule."""

    momentum: float = 0.0  # the banks' mu
    adam_step: bool = True  # Adam's parameters step too; otherwise their gradients keep accumulating
    split: bool = False  # after this step the embedding and the head train apart
    event: bool = True  # tables and cyclic parameters step
    repeat: int = 1  # this update of a cyclic parameter stands for this many: betas and decay


class BanksAndAdamSpec(BaseOptimizerSpec):
    """Base of the specs of Adam and banks of matrices side by side, with explicit orders of communication and work.

    By default, groups and orders are those of the model's table of parameters.
    """

    trains: ClassVar[tuple[type, ...]] = (Adam, NorMuon)
    bank_part: ClassVar[str]

    adam: AdamSpec
    tied_head: TiedHeadSpec
    reduce_order: Annotated[Names, NOT_COMPILED] = Field(default=[])
    # Except for neighbours updated by one function: `updated_together`.
    update_order: Annotated[Names, NOT_COMPILED] = Field(default=[])

    @classmethod
    def defaults(cls, rows: Sequence[Parameter]) -> dict[str, Any]:
        """The table as a recipe would say it."""
        adam, banks = {}, {}
        for row in rows:
            communication = "sharded" if getattr(row.train, "sharded", False) else "replicated"
            if isinstance(row.train, Adam):
                numbers = {"betas": list(row.train.betas), "lr_mul": row.train.lr_mul, "wd_mul": row.train.wd_mul}
                adam[row.name] = {**numbers, "communication": communication}
            elif isinstance(row.train, NorMuon):
                banks[row.name] = {"lr_muls": list(row.train.lr_muls), "communication": communication}
        return {
            "adam": {"groups": adam},
            cls.bank_part: {"groups": banks},
            "reduce_order": [row.name for row in rows],
            "update_order": [row.name for row in sorted(rows, key=lambda row: row.update)],
        }

    def problems(
        self, rows: Sequence[Parameter], *, world_size: int, stages: int, total_steps: int
    ) -> Iterator[Problem]:
        """Groups and orders that differ from the table's, indivisible shards, a schedule that does not fit."""
        yield from self._sharding_problems(rows, world_size)
        labels = [row.name for row in rows]
        adam_labels = [row.name for row in rows if isinstance(row.train, Adam)]
        banks = [row.name for row in rows if isinstance(row.train, NorMuon)]
        for path, found, wanted in (
            (("adam", "groups"), list(self.adam.groups), adam_labels),
            ((self.bank_part, "groups"), list(self.banks.groups), banks),
            (("reduce_order",), self.reduce_order, labels),
            (("update_order",), self.update_order, labels),
        ):
            missing = [label for label in wanted if label not in found]
            unknown = [f"{label}{_nearest(label, wanted)}" for label in found if label not in wanted]
            twice = sorted({label for label in found if found.count(label) > 1})
            parts = [
                f"{word} {', '.join(names)}"
                for word, names in (("misses", missing), ("does not know", unknown), ("names twice", twice))
                if names
            ]
            if parts:
                yield path, f"{'; '.join(parts)} (the model's parameters are {', '.join(wanted)})"
        momentum = self.banks.momentum
        if momentum.warmup_steps + momentum.cooldown_steps > total_steps:
            yield (
                (self.bank_part, "momentum"),
                f"warms up for {momentum.warmup_steps} and cools down for {momentum.cooldown_steps} steps,"
                f" the run has {total_steps}",
            )
        if self.tied_head.split_stage >= stages:
            yield (
                ("tied_head", "split_stage"),
                f"is {self.tied_head.split_stage}, the run has stages 0..{stages - 1}",
            )

    def _sharding_problems(self, rows: Sequence[Parameter], world_size: int) -> Iterator[Problem]:
        groups: dict[str, AdamGroup | BankGroup] = {**self.adam.groups, **self.banks.groups}
        for row in rows:
            group = groups.get(row.name)
            if group is not None and group.communication == "sharded" and row.units % world_size:
                part, unit = (self.bank_part, "matrices") if isinstance(row.train, NorMuon) else ("adam", "rows")
                hint = f"; model.{row.padding} can fill up" if row.padding else ""
                yield (
                    (part, "groups", row.name, "communication"),
                    f"sharded needs {unit} that {world_size} ranks share evenly, {row.name} has {row.units}{hint}",
                )

    @property
    def banks(self) -> BanksSpec:
        """How the banks are updated."""
        banks: BanksSpec = getattr(self, self.bank_part)
        return banks

    @property
    def cyclic_groups(self) -> Sequence[str]:
        """Adam's groups that step at events."""
        return ()

    @property
    def steps_between_updates(self) -> int:
        """Adam's."""
        return self.adam.every

    def is_event(self, step: int) -> bool:
        """Tables are updated when Adam's parameters are."""
        return self.is_adam_step(step)

    def is_adam_step(self, step: int) -> bool:
        """Adam's parameters step on the last of every `adam.every` steps."""
        return step % self.adam.every == self.adam.every - 1

    def momentum(self, step: int, total_steps: int) -> float:
        """The banks' mu: up over the first steps, down over the last."""
        m = self.banks.momentum
        if step < m.warmup_steps:
            return m.low + (m.high - m.low) * step / m.warmup_steps
        cooldown = total_steps - m.cooldown_steps
        if step > cooldown:
            return m.high - (m.high - m.low) * (step - cooldown) / m.cooldown_steps
        return m.high

    def split_step(self, first_steps: Sequence[int]) -> int:
        """The first Adam step of the split stage; itself still tied."""
        step = first_steps[self.tied_head.split_stage]
        while not self.is_adam_step(step):
            step += 1
        return step

    def warmup_steps(self, first_steps: Sequence[int]) -> list[int]:
        """The split and the first update after it, the embedding's own, if no later stage's steps include one."""
        split = self.split_step(first_steps)
        return [split, split + self.adam.every] if split >= first_steps[-1] else []

    def rates(self, step: int, lr_factor: float, *, first_steps: Sequence[int], total_steps: int) -> BanksAndAdamRates:
        """See the base."""
        return BanksAndAdamRates(
            lr_factor=lr_factor,
            momentum=self.momentum(step, total_steps),
            adam_step=self.is_adam_step(step),
            split=step == self.split_step(first_steps),
            event=self.is_event(step),
        )

    def shortened(self, scaled: Callable[[int], int], total_steps: int) -> dict[str, Any]:
        """Momentum's warm-up and cooldown keep their shares of the run."""
        data = self.model_dump()
        momentum = data[self.bank_part]["momentum"]
        momentum["warmup_steps"] = scaled(momentum["warmup_steps"])
        momentum["cooldown_steps"] = min(scaled(momentum["cooldown_steps"]), total_steps - momentum["warmup_steps"])
        return data

    @property
    def plans(self) -> dict[str, ParameterPlan]:
        """Every parameter's plan by label."""
        groups: dict[str, AdamGroup | BankGroup] = {**self.banks.groups, **self.adam.groups}
        return {
            label: ParameterPlan(
                label,
                sharded=group.communication == "sharded",
                bank=label in self.banks.groups,
                cyclic=label in self.cyclic_groups,
            )
            for label, group in groups.items()
        }

    def step_plan(self, *, adam_step: bool, tied: str | None, event: bool = True) -> StepPlan:
        """What a step updates: banks always, Adam's parameters on Adam steps, cyclic ones at events, `tied` never."""
        plans = self.plans

        def chosen(order: list[str]) -> tuple[ParameterPlan, ...]:
            found = (plans[label] for label in order if label != tied)
            return tuple(plan for plan in found if plan.due(adam_step=adam_step, event=event))

        return StepPlan(chosen(self.reduce_order), chosen(self.update_order))

    def updated_together(self, rows: Sequence[Parameter]) -> list[list[str]]:
        """See the base."""
        ties = {None, next((row.name for row in rows if row.tied_to), None)}
        plans = [
            self.step_plan(adam_step=adam_step, tied=tied, event=event)
            for adam_step, tied, event in itertools.product((False, True), ties, (False, True))
        ]
        found = {tuple(p.label for p in together) for plan in plans for together in updated_together(plan.update)}
        return [list(labels) for labels in sorted(found)]


def _nearest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
