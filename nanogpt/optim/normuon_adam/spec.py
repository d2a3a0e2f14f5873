"""NorMuon and Adam side by side: the spec. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from nanogpt.optim.banks_and_adam_spec import BanksAndAdamSpec, BanksSpec


class NorMuonAdamSpec(BanksAndAdamSpec):
    """Adam and NorMuon side by side, with explicit orders of communication and work.

    The groups and orders of a recipe that does not name them are those of the model's table of parameters.
    """

    bank_part: ClassVar[str] = "normuon"

    kind: Literal["normuon_adam"]
    normuon: BanksSpec
