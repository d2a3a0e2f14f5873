"""Base of the records' optimizers: banks of matrices every step, Adam for the rest every other step.

A step starts all reductions in one order, then updates in another, and starts each gather as soon as its update is
done, so that communication hides behind the orthogonalization of the banks, which come last. While the head is tied,
the embedding is the head transposed: its gradient joins the head's before communication; it is refreshed afterwards.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from nanogpt.cache.graphs import compile_whole
from nanogpt.captured import Captured
from nanogpt.kernels.transpose import transpose_add, transpose_copy
from nanogpt.optim.adam import adam_step_size, adam_updates
from nanogpt.optim.banks_and_adam_spec import BanksAndAdamRates, BanksAndAdamSpec
from nanogpt.optim.communication import Communicator, Pending, RankOf
from nanogpt.optim.normuon import second_moment_dim
from nanogpt.optim.pending import gather_pending, pending_gradient
from nanogpt.optim.row_table import Rows, TouchedRows, average_touched_shard
from nanogpt.optim.step_order import ParameterPlan, updated_together
from nanogpt.parameters import NorMuon, Parameter

State = dict[str, Tensor]
Spec = TypeVar("Spec", bound=BanksAndAdamSpec)
OwnRates = TypeVar("OwnRates", bound=BanksAndAdamRates)


class BanksAndAdam(ABC, Generic[Spec, OwnRates]):
    """See the module. A subclass provides the update of a bank, and names its state.

    Args:
        model: its named parameters are those of the table.
        rows: the table.
        touched: by label, the rows in a table's gradient, if it is exchanged by rows.
        capture: replay a bank's update as a CUDA graph, and clear gradients in place, for callers that captured where
            they are.
        tables: by name, tables that are not parameters, for a subclass that updates them.
    """

    bank_update: ClassVar[Callable[..., None]]  # the formula, to be compiled
    momenta: ClassVar[tuple[str, ...]]  # its state for a bank, each of the bank's shape

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Parameter],
        spec: Spec,
        communicator: Communicator,
        *,
        compiled: bool = False,
        plain_kernels: bool = False,
        touched: dict[str, TouchedRows] | None = None,
        capture: bool = False,
        tables: Mapping[str, Any] | None = None,
    ):
        self.rows = tuple(rows)
        self.matrix_rows = {row.name: row.train.rows for row in rows if isinstance(row.train, NorMuon)}
        tied = next((row for row in rows if row.tied_to), None)
        self.tied_label = tied.name if tied else None
        self.head_label = tied.tied_to if tied else None
        self.touched = touched or {}
        self.capture = capture
        self.tables = dict(tables or {})
        self.gathering: set[str] = set()  # whose gradients accumulate between their updates
        self.spec = spec
        self.communicator = communicator
        self.parameters = dict(model.named_parameters())
        self.plans = spec.plans
        self.plain_kernels = plain_kernels
        self.tied = self.tied_label is not None
        self.adam_counts = dict.fromkeys(spec.adam.groups, 0)
        self.state: dict[str, State] = {}
        for label, plan in self.plans.items():
            if label != self.tied_label:
                self.state[label] = self._bank_state(label) if plan.bank else self._adam_state(label)
        self.multipliers = {
            label: self._multipliers(label, self._own(plan, self.parameters[label].data))
            for label, plan in self.plans.items()
            if plan.bank
        }
        self._numbers: dict[str, Tensor] = {}
        self._step_sizes = {label: torch.empty_like(muls) for label, muls in self.multipliers.items()}
        self._averages: dict[str, Tensor] = {}
        self._adam: Callable[..., None] = compile_whole(adam_updates) if compiled else adam_updates
        self._bank = Captured(compile_whole(self.bank_update) if compiled else self.bank_update, active=capture)

    # --- views and state ---

    def _matrices(self, label: str, full: Tensor) -> Tensor:
        """A bank as (matrices, rows, columns)."""
        return full.view(-1, self.matrix_rows[label], full.shape[-1])

    def _view(self, plan: ParameterPlan, full: Tensor) -> Tensor:
        return self._matrices(plan.label, full) if plan.bank else full

    def _own(self, plan: ParameterPlan, full: Tensor) -> Tensor:
        view = self._view(plan, full)
        return self.communicator.shard(view) if plan.sharded else view

    def _full(self, plan: ParameterPlan, own: Tensor) -> Tensor:
        """All ranks' parts of what this rank's `own` is a part of, in new memory."""
        return self.communicator.unshard(own) if plan.sharded else own.clone()

    def _adam_state(self, label: str) -> State:
        own = self._own(self.plans[label], self.parameters[label].data)
        return {name: torch.zeros_like(own, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}

    def _bank_state(self, label: str) -> State:
        own = self._own(self.plans[label], self.parameters[label].data)
        shape = list(own.shape)
        shape[second_moment_dim(shape)] = 1
        state = {name: torch.zeros_like(own, dtype=torch.float32) for name in self.momenta}
        state["second_moment"] = torch.zeros(shape, dtype=torch.float32, device=own.device)
        if own.dtype == torch.bfloat16:
            state["mantissa"] = torch.zeros_like(own, dtype=torch.int16)
        return state

    # --- a step ---

    def expect_rows(self, rows: Mapping[str, Sequence[Rows]], rates: OwnRates) -> None:
        """Note the rows that the tables' gradients will have; all are known before a table's update."""
        for label, touched in self.touched.items():
            touched.add(rows[touched.extra])
            if self.plans[label].due(adam_step=rates.adam_step, event=rates.event):
                touched.prepare()

    def lines(self) -> list[str]:
        """See the interface."""
        return self._bank.lines("updates of banks")

    @torch.no_grad()
    def step(self, rates: OwnRates) -> None:
        """Reduce, update, gather, clear; see the module. Raises RuntimeError if a parameter has no gradient."""
        tied, head = (self.tied_label, self.head_label) if self.tied else (None, None)
        plan = self.spec.step_plan(adam_step=rates.adam_step, tied=tied, event=rates.event)
        if rates.adam_step and tied is not None and head is not None:
            transpose_add(self._gradient(tied), self._gradient(head))

        reductions = self._start_reductions(plan.reduce, rates)
        gathers = self._update_all(updated_together(plan.update), reductions, rates)
        if rates.adam_step and tied is not None and head is not None:
            if head in gathers:
                gathers.pop(head).wait()
            transpose_copy(self.parameters[head].data, self.parameters[tied].data)
            self._clear(tied)
            if rates.split:
                self._split(tied, head)
        for gather in gathers.values():
            gather.wait()
        due = {label for label, p in self.plans.items() if p.due(adam_step=rates.adam_step, event=rates.event)}
        self.gathering = self.plans.keys() - due

    def _start_reductions(self, plans: Sequence[ParameterPlan], rates: OwnRates) -> dict[str, Pending]:
        """In the order of the plans, by label; of parameters that are not sharded, neighbours together."""
        started: dict[str, Pending] = {}
        for sharded, group in itertools.groupby(plans, key=lambda plan: plan.sharded):
            each = [(plan, self._gradient(plan.label)) for plan in group]
            if sharded:
                started |= {plan.label: self._start_reduction(plan, gradient) for plan, gradient in each}
            else:
                views = [self._view(plan, gradient) for plan, gradient in each]
                averages = self.communicator.average_together(views)
                started |= {plan.label: average for (plan, _), average in zip(each, averages, strict=True)}
        return started

    def _update_all(
        self, batches: Sequence[Sequence[ParameterPlan]], reductions: dict[str, Pending], rates: OwnRates
    ) -> dict[str, Pending]:
        """Update batch by batch; uses up the reductions and returns the gathers, by label."""
        gathers = {}
        for together in batches:
            labels = [p.label for p in together]
            gradients = [reductions.pop(label).wait() for label in labels]
            own = [self._own(p, self.parameters[p.label].data) for p in together]
            self._update(labels, own, gradients, rates)
            for p in together:
                self._clear(p.label)
                if p.sharded:
                    gathers[p.label] = self.communicator.gather(self._view(p, self.parameters[p.label].data))
        return gathers

    def _update(
        self, labels: Sequence[str], own: Sequence[Tensor], gradients: Sequence[Tensor], rates: OwnRates
    ) -> None:
        """Update a bank, or those parameters of Adam's that are updated together."""
        if self.plans[labels[0]].bank:
            self._update_bank(labels[0], own[0], gradients[0], rates)
        else:
            self._update_adam(labels, own, gradients, rates)

    def _clear(self, label: str) -> None:
        gradient = self.parameters[label].grad
        if self.capture and gradient is not None:
            gradient.zero_()
        else:
            self.parameters[label].grad = None

    def _gradient(self, label: str) -> Tensor:
        gradient = self.parameters[label].grad
        if gradient is None:
            raise RuntimeError(f"{label} has no gradient: no backward pass has reached it since it was last cleared")
        return gradient

    def _start_reduction(self, plan: ParameterPlan, gradient: Tensor) -> Pending:
        """Reduce this rank's `gradient` of a sharded parameter, of its shape, which is used up."""
        gradient = self._view(plan, gradient)
        touched = self.touched.get(plan.label)
        if touched is not None:
            exchange = touched.take()
            touched.clear()
            if exchange is not None:
                return average_touched_shard(self.communicator, gradient, exchange)
        return self.communicator.average_shard(gradient, self._average(plan, gradient))

    def _average(self, plan: ParameterPlan, gradient: Tensor) -> Tensor | None:
        """Where this rank's part of a bank's mean gradient always is, if a captured update reads it."""
        if not (self.capture and plan.bank) or self.communicator.size == 1:
            return None
        if plan.label not in self._averages:
            self._averages[plan.label] = torch.empty_like(self.communicator.shard(gradient))
        return self._averages[plan.label]

    def _update_adam(
        self, labels: Sequence[str], own: Sequence[Tensor], gradients: Sequence[Tensor], rates: BanksAndAdamRates
    ) -> None:
        adam, step_sizes, decays, betas = self.spec.adam, [], [], []
        for label in labels:
            group = adam.groups[label]
            repeat = rates.repeat if self.plans[label].cyclic else 1
            self.adam_counts[label] += 1
            lr = adam.lr * group.lr_mul * rates.lr_factor
            betas.append((group.betas[0] ** repeat, group.betas[1] ** repeat))
            step_sizes.append(torch.tensor(adam_step_size(lr, betas[-1], self.adam_counts[label])))
            decays.append(torch.tensor(lr * lr * adam.weight_decay * group.wd_mul * repeat))
        self._adam(
            own,
            gradients,
            [self.state[label]["exp_avg"] for label in labels],
            [self.state[label]["exp_avg_sq"] for label in labels],
            step_sizes,
            decays,
            betas,
            adam.eps,
        )

    @abstractmethod
    def _update_bank(self, label: str, own: Tensor, gradient: Tensor, rates: OwnRates) -> None:
        """Update this rank's matrices `own` (n, rows, columns), by `self._bank`."""

    @abstractmethod
    def _kinds_of_rates(self) -> Sequence[OwnRates]:
        """One of each kind with its own compiled code."""

    def _bank_sizes(self, label: str, rates: OwnRates) -> tuple[Tensor, Tensor]:
        """The step size of each of this rank's matrices, (n, 1, 1), and the decay, (), for `cautious_update`."""
        banks = self.spec.banks
        lr = banks.lr * rates.lr_factor
        step_sizes = torch.mul(self.multipliers[label], lr, out=self._step_sizes[label])
        return step_sizes, self._number("decay", banks.weight_decay * lr)

    def _number(self, name: str, value: float) -> Tensor:
        """() on the banks' device, for each name in one place, from which a captured update reads it."""
        if name not in self._numbers:
            self._numbers[name] = torch.empty((), device=next(iter(self.multipliers.values())).device)
        return self._numbers[name].fill_(value)

    @torch.no_grad()
    def warm_up(self, world_size: int) -> None:
        """Run the updates of a rank of `world_size` once on tensors of zeros, so that they are compiled."""
        zeros = nn.ParameterDict({label: torch.zeros_like(full) for label, full in self.parameters.items()})
        twin = type(self)(zeros, self.rows, self.spec, RankOf(world_size), plain_kernels=self.plain_kernels)
        if self.tied_label is not None:
            twin.state[self.tied_label] = twin._adam_state(self.tied_label)
        twin._adam, twin._bank = self._adam, Captured(self._bank.function, active=False)
        for rates, labels in itertools.product(self._kinds_of_rates(), self.spec.updated_together(self.rows)):
            own = [twin._own(self.plans[label], twin.parameters[label].data) for label in labels]
            gradients = [torch.zeros_like(part) for part in own]
            twin._update(labels, own, gradients, rates)

    def _multipliers(self, label: str, own: Tensor) -> Tensor:
        """(n, 1, 1) fp32, for this rank's matrices: sqrt(max(1, rows / columns)) times the group's multipliers."""
        count, rows, columns = own.shape
        first = self.communicator.rank * count if self.plans[label].sharded else 0
        muls = self.spec.banks.groups[label].lr_muls
        shape_factor = math.sqrt(max(1.0, rows / columns))
        values = [shape_factor * muls[(first + i) % len(muls)] for i in range(count)]
        return torch.tensor(values, device=own.device).view(count, 1, 1)

    def _split(self, tied: str, head: str) -> None:
        """Give the tied parameter its own Adam state, the head's transposed, and its step count."""
        self.state[tied] = {}
        for name, own in self.state[head].items():
            full = self.communicator.unshard(own) if self.plans[head].sharded else own
            transposed = full.mT.contiguous()
            sharded = self.plans[tied].sharded
            self.state[tied][name] = self.communicator.shard(transposed).clone() if sharded else transposed
        self.adam_counts[tied] = self.adam_counts[head]
        self.tied = False

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Full tensors, for any world size.

        Also the gradients that Adam's parameters have accumulated so far, by rank (`nanogpt.optim.pending`, with the
        rows that `touched` knows).
        """
        tensors = {
            label: {name: self._full(self.plans[label], own) for name, own in state.items()}
            for label, state in self.state.items()
        }
        gathered = ((label, self.parameters[label].grad) for label in self.spec.adam.groups if label in self.gathering)
        pending = gather_pending(self.communicator, {label: grad for label, grad in gathered if grad is not None})
        return {
            "tensors": tensors,
            "adam_counts": dict(self.adam_counts),
            "tied": self.tied,
            "pending_gradients": pending,
            "touched": {label: touched.state() for label, touched in self.touched.items() if label in self.gathering},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict` of any world size; tensors are copied, other gradients cleared."""
        self.tied = bool(state["tied"])
        self.adam_counts = {label: int(state["adam_counts"][label]) for label in self.adam_counts}
        tied = self.tied_label
        if tied is not None and self.tied:
            self.state.pop(tied, None)
        elif tied is not None and tied not in self.state:
            self.state[tied] = self._adam_state(tied)
        for label, tensors in state["tensors"].items():
            for name, full in tensors.items():
                own = self.communicator.shard(full) if self.plans[label].sharded else full
                self.state[label][name].copy_(own)
        pending = state["pending_gradients"]
        self.gathering = set()
        for label, parameter in self.parameters.items():
            self._clear(label)
            old = isinstance(pending, dict)  # an older checkpoint: the mean over ranks, by label
            gradient = pending.get(label) if old else pending_gradient(pending, label, self.communicator)
            if label in self.touched:
                self.touched[label].clear()
            if gradient is None:
                continue
            self.gathering.add(label)
            if label in self.touched:
                self.touched[label].load_state(state.get("touched", {}).get(label))
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient)
