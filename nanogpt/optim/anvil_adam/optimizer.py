"""Record 92's optimizer: ANVIL on the banks, Adam on the rest, tables of rows on a cadence of their own.

- `nanogpt.optim.banks_and_adam` has all that it shares with NorMuon's.
- Groups of Adam in `tables.groups` step at events only (public record 92, PR #360): their gradients are sums over the
  steps since the one before. Those of the steps after a run's last event are dropped.
- Tables that are not parameters of the model update themselves. A step tells them when: their gradients leave behind
  all reductions, and travel while everything else is updated; then they are updated, and their rows return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nanogpt.optim.anvil import anvil_update
from nanogpt.optim.anvil_adam.spec import AnvilAdamRates, AnvilAdamSpec
from nanogpt.optim.banks_and_adam import BanksAndAdam
from nanogpt.optim.communication import Pending
from nanogpt.optim.step_order import ParameterPlan


class AnvilAdam(BanksAndAdam[AnvilAdamSpec, AnvilAdamRates]):
    """See the module."""

    bank_update = staticmethod(anvil_update)
    momenta = ("fast", "slow")

    def _start_reductions(self, plans: Sequence[ParameterPlan], rates: AnvilAdamRates) -> dict[str, Pending]:
        reductions = super()._start_reductions(plans, rates)
        if rates.event:
            for table in self.tables.values():
                table.start_push()
        return reductions

    def _update_all(
        self, batches: Sequence[Sequence[ParameterPlan]], reductions: dict[str, Pending], rates: AnvilAdamRates
    ) -> dict[str, Pending]:
        gathers = super()._update_all(batches, reductions, rates)
        if rates.event:
            for table in self.tables.values():
                table.update(rates.table)
        return gathers

    def _update_bank(self, label: str, own: Tensor, gradient: Tensor, rates: AnvilAdamRates) -> None:
        anvil, state = self.spec.anvil, self.state[label]
        step_size, decay = self._bank_sizes(label, rates)
        self._bank(
            own,
            gradient,
            state["fast"],
            state["slow"],
            state["second_moment"],
            state.get("mantissa"),
            self._number("momentum", rates.momentum),
            self._number("fast_beta", rates.fast_beta),
            self._number("fast_share", rates.fast_share),
            step_size,
            decay,
            anvil.slow_momentum.beta,
            anvil.beta2,
            tuple(anvil.polar_express),
            anvil.norm_margin,
            self.plain_kernels,
        )

    def _kinds_of_rates(self) -> Sequence[AnvilAdamRates]:
        later = self.spec.repeat(self.spec.tables.from_step)
        return [AnvilAdamRates(lr_factor=1.0, momentum=0.9, repeat=repeat) for repeat in sorted({1, later})]

    def state_dict(self) -> dict[str, Any]:
        """The base's, and the tables' by name."""
        return {**super().state_dict(), "tables": {name: table.state_dict() for name, table in self.tables.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base."""
        super().load_state_dict(state)
        for name, table in self.tables.items():
            table.load_state_dict(state["tables"][name])
