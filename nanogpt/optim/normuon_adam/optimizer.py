"""The speedrun's and record 89's optimizer: NorMuon on the banks, Adam on the rest (`nanogpt.optim.banks_and_adam`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nanogpt.optim.banks_and_adam import BanksAndAdam
from nanogpt.optim.banks_and_adam_spec import BanksAndAdamRates
from nanogpt.optim.normuon import normuon_update
from nanogpt.optim.normuon_adam.spec import NorMuonAdamSpec


class NorMuonAdam(BanksAndAdam[NorMuonAdamSpec, BanksAndAdamRates]):
    """See the module."""

    bank_update = staticmethod(normuon_update)
    momenta = ("momentum",)

    def _update_bank(self, label: str, own: Tensor, gradient: Tensor, rates: BanksAndAdamRates) -> None:
        normuon, state = self.spec.normuon, self.state[label]
        step_size, decay = self._bank_sizes(label, rates)
        self._bank(
            own,
            gradient,
            state["momentum"],
            state["second_moment"],
            state.get("mantissa"),
            self._number("momentum", rates.momentum),
            step_size,
            decay,
            normuon.beta2,
            tuple(normuon.polar_express),
            normuon.norm_margin,
            self.plain_kernels,
        )

    def _kinds_of_rates(self) -> Sequence[BanksAndAdamRates]:
        return (BanksAndAdamRates(lr_factor=1.0, momentum=0.9),)
