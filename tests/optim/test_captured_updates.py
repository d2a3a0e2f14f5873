"""Updates of banks that are replayed as they were at their second step, against updates that are not."""

from __future__ import annotations

from typing import Any, Protocol

import pytest
import test_anvil_adam as anvil
import test_normuon_adam as normuon
import torch
import torch.distributed as dist
from called_again import CalledAgain, instead_of_graphs
from forked import in_ranks
from small_specs import add_gradients_alike
from torch import nn

from nanogpt.optim.anvil_adam.optimizer import AnvilAdam
from nanogpt.optim.banks_and_adam import BanksAndAdam
from nanogpt.optim.communication import Communicator
from nanogpt.optim.normuon_adam.optimizer import NorMuonAdam

pytestmark = pytest.mark.usefixtures("one_thread")


class Case(Protocol):
    """A model and its optimizer, and some steps."""

    steps: range

    def make(self, communicator: Communicator, *, capture: bool) -> tuple[nn.Module, BanksAndAdam[Any, Any]]: ...

    def rates_of(self, step: int) -> Any: ...


class Anvil:
    steps = range(330, 342)  # the cadence of tables changes

    def make(self, communicator: Communicator, *, capture: bool) -> tuple[nn.Module, BanksAndAdam[Any, Any]]:
        model = anvil.make_model(torch.float32)
        return model, AnvilAdam(model, anvil.ROWS, anvil.SPEC, communicator, capture=capture)

    def rates_of(self, step: int) -> Any:
        return anvil.rates_of(step)


class NorMuon:
    steps = range(12)

    def make(self, communicator: Communicator, *, capture: bool) -> tuple[nn.Module, BanksAndAdam[Any, Any]]:
        model = normuon.make_model(torch.float32)
        return model, NorMuonAdam(model, model.rows, normuon.SPEC.optimizer, communicator, capture=capture)

    def rates_of(self, step: int) -> Any:
        return normuon.rates_of(step)


def check(case: Case, communicator: Communicator) -> None:
    """Raises AssertionError if a weight differs after a step."""
    (model, captured), (plain, eager) = (case.make(communicator, capture=capture) for capture in (True, False))
    for step in case.steps:
        add_gradients_alike(model, plain, torch.Generator().manual_seed(1000 * step + communicator.rank))
        for optimizer in (captured, eager):
            optimizer.step(case.rates_of(step))
        for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other), (step, name)
        if step == case.steps[3]:  # as the warm-up does, after it has captured
            for optimizer in (captured, eager):
                optimizer.load_state_dict(optimizer.state_dict())
    banks = sum(plan.bank for plan in captured.plans.values())
    assert captured.lines() == [f"CUDA graphs: updates of banks, {banks} captured"]
    assert CalledAgain.replays == banks * (len(case.steps) - 1), "every step but the first"
    assert eager.lines() == []


@pytest.mark.parametrize("case", [Anvil(), NorMuon()], ids=["anvil_adam", "normuon_adam"])
def test_on_one_rank(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    instead_of_graphs(monkeypatch)
    check(case, Communicator())


def check_in_ranks() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with pytest.MonkeyPatch.context() as patch:
        instead_of_graphs(patch)
        check(Anvil(), Communicator(dist.get_rank(), dist.get_world_size()))


def test_on_two_ranks() -> None:
    for done in in_ranks(2, check_in_ranks):
        assert done.returncode == 0, done.stderr
