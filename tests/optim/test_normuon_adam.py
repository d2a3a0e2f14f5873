"""The speedrun's optimizer over several steps of a small model, against the rules label by label in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_specs import randomize, small_speedrun
from test_adam import slow_adam
from test_normuon import slow_step
from torch import nn

from nanogpt.models.language_model import Implementations
from nanogpt.models.speedrun.model import Speedrun
from nanogpt.optim.banks_and_adam_spec import BanksAndAdamRates
from nanogpt.optim.communication import Communicator
from nanogpt.optim.normuon_adam.optimizer import NorMuonAdam
from nanogpt.optim.normuon_adam.spec import NorMuonAdamSpec
from nanogpt.optim.step_order import ParameterPlan, updated_together

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = small_speedrun(head_dim=4)

# betas, lr_mul, wd_mul
ADAM: dict[str, tuple[float, float, float, float]] = {
    "scalars": (0.9, 0.99, 5, 0),
    "value_embed": (0.75, 0.95, 75, 5),
    "bigram_embed": (0.75, 0.95, 75, 5),
    "smear_gate": (0.9, 0.99, 0.01, 0),
    "skip_gate": (0.9, 0.99, 0.05, 0),
    "attn_gate_bank": (0.9, 0.99, 1, 1),
    "ve_gate_bank": (0.9, 0.99, 1, 1),
    "x0_lambdas": (0.65, 0.95, 5, 0),
    "lm_head": (0.5, 0.95, 1, 150),
    "embed": (0.5, 0.95, 1, 150),
}


# rows of a matrix, update multipliers in turn
BANKS: dict[str, tuple[int, tuple[float, ...]]] = {"attn": (24, (1.0,)), "mlp": (96, (2.0, 4.0))}


def make_model(dtype: torch.dtype = torch.float64) -> Speedrun:
    model = Speedrun(SPEC.model, dtype=dtype, max_tokens=16, implementations=Implementations())
    randomize(model)
    with torch.no_grad():
        model.embed.copy_(model.lm_head.mT)
    return model


def optimizer_of(model: Speedrun, spec: NorMuonAdamSpec, communicator: Communicator) -> NorMuonAdam:
    return NorMuonAdam(model, model.rows, spec, communicator)


def rates_of(step: int, split_step: int = 5) -> BanksAndAdamRates:
    return BanksAndAdamRates(
        lr_factor=[1.0, 1.52, 1.73, 0.7, 0.1][step % 5],
        momentum=0.85 + 0.01 * step,
        adam_step=step % 2 == 1,
        split=step == split_step,
    )


def gradients_of(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    # Adam's update hardly depends on the gradients' size, unless they are as small as eps: skip_gate's are.
    return {
        label: ((1e-10 if label == "skip_gate" else 1) * torch.randn(p.shape, generator=generator).double()).to(p.dtype)
        for label, p in model.named_parameters()
    }


def accumulate(model: nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    """As backward passes do: two micro-steps, added to what is there."""
    for label, p in model.named_parameters():
        for share in (0.25, 0.75):
            part = share * gradients[label]
            p.grad = part if p.grad is None else p.grad + part


class SlowOptimizer:
    """The whole history of gradients is kept and Adam is run again from the start each time."""

    def __init__(
        self,
        model: nn.Module,
        adam: dict[str, tuple[float, float, float, float]] = ADAM,
        banks: dict[str, tuple[int, tuple[float, ...]]] = BANKS,
        beta2: float = 0.95,
    ):
        self.labels, self.beta2 = adam, beta2
        self.start = {label: p.detach().double().clone() for label, p in model.named_parameters()}
        self.now = {label: p.clone() for label, p in self.start.items()}
        self.sums: dict[str, list[torch.Tensor]] = {label: [] for label in adam}
        self.factors: list[float] = []
        self.waiting: list[dict[str, torch.Tensor]] = []
        self.banks: dict[str, Any] = {}
        for label, (rows, mults) in banks.items():
            count = self.now[label].numel() // (rows * 24)
            self.banks[label] = {
                "p": self.now[label].numpy().reshape(count, rows, 24),  # shares memory
                "momentum": np.zeros((count, rows, 24)),
                "s": np.zeros((count, max(rows, 24))),
                "mult": mults * (count // len(mults)),
            }
        self.split_after: int | None = None  # Adam steps made when the head was split

    def step(self, gradients: dict[str, torch.Tensor], rates: BanksAndAdamRates) -> None:
        for label, bank in self.banks.items():
            g = gradients[label].double().numpy().reshape(bank["p"].shape)
            for n, mult in enumerate(bank["mult"]):
                slow_step(
                    bank["p"][n],
                    g[n],
                    bank["momentum"][n],
                    bank["s"][n],
                    mu=rates.momentum,
                    lr=0.023 * rates.lr_factor,
                    mult=mult,
                    beta2=self.beta2,
                )
        self.waiting.append({label: g.double() for label, g in gradients.items()})
        if not rates.adam_step:
            return
        total = {label: sum(g[label] for g in self.waiting) for label in self.labels}
        self.waiting = []
        self.factors.append(rates.lr_factor)
        tied = self.split_after is None
        if tied:
            total["lm_head"] = total["lm_head"] + total["embed"].T
            total["embed"] = total["lm_head"].T
        for label in self.labels:
            self.sums[label].append(total[label])
            self.now[label] = self.adam(label)
        if tied:
            self.now["embed"] = self.now["lm_head"].T.clone()
        if rates.split:
            self.split_after = len(self.factors)

    def adam(self, label: str) -> torch.Tensor:
        # With embed's history being lm_head's transposed while tied, its moments and count come out as handed over.
        b1, b2, lr_mul, wd_mul = self.labels[label]
        p, _, _ = slow_adam(
            self.start[label].flatten().tolist(),
            [g.flatten().tolist() for g in self.sums[label]],
            [0.008 * lr_mul * factor for factor in self.factors],
            b1,
            b2,
            1e-10,
            0.005 * wd_mul,
        )
        return torch.tensor(p, dtype=torch.float64).view(self.start[label].shape)


def test_eight_steps_with_the_split_in_the_sixth():
    model = make_model()
    optimizer, slow = optimizer_of(model, SPEC.optimizer, Communicator()), SlowOptimizer(model)
    for step in range(8):
        gradients, rates = gradients_of(model, step), rates_of(step)
        accumulate(model, gradients)
        optimizer.step(rates)
        slow.step(gradients, rates)
        for label, p in model.named_parameters():
            change, expected = p.detach().double() - slow.start[label], slow.now[label] - slow.start[label]
            rounding = 2**-23 * slow.start[label].norm()  # of the update's arithmetic in fp32
            assert (change - expected).norm() <= 1e-4 * expected.norm() + rounding, (step, label)
            if label in ADAM and not rates.adam_step:
                assert p.grad is not None, "kept for the next step"
            else:
                assert p.grad is None, "cleared"
        tied = torch.equal(model.embed, model.lm_head.mT)
        assert tied == (step < 7), step
    assert optimizer.adam_counts == dict.fromkeys(ADAM, 4)


def test_moments_are_handed_over_transposed():
    model = make_model(torch.float32)
    optimizer = optimizer_of(model, SPEC.optimizer, Communicator())
    for step in range(6):
        assert "embed" not in optimizer.state
        accumulate(model, gradients_of(model, step))
        optimizer.step(rates_of(step))
    assert not optimizer.tied
    for name in ("exp_avg", "exp_avg_sq"):
        head, embed = optimizer.state["lm_head"][name], optimizer.state["embed"][name]
        assert torch.equal(embed, head.mT)
        assert embed.data_ptr() != head.data_ptr()
    assert optimizer.adam_counts["embed"] == optimizer.adam_counts["lm_head"] == 3


def test_dtypes_and_memory_of_the_state():
    for dtype, mantissa in ((torch.bfloat16, True), (torch.float32, False)):
        optimizer = optimizer_of(make_model(dtype), SPEC.optimizer, Communicator())
        for label in ("attn", "mlp"):
            state = optimizer.state[label]
            assert ("mantissa" in state) == mantissa
            assert state["momentum"].dtype == state["second_moment"].dtype == torch.float32
        for label in ADAM.keys() - {"embed"}:
            assert all(x.dtype == torch.float32 for x in optimizer.state[label].values())
        shapes = {label: tuple(optimizer.state[label]["momentum"].shape) for label in ("attn", "mlp")}
        assert shapes == {"attn": (40, 24, 24), "mlp": (24, 96, 24)}
        assert tuple(optimizer.state["mlp"]["second_moment"].shape) == (24, 96, 1)


class OneOf(Communicator):
    """Of a rank's place only; it sends nothing."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.group, self.nccl = rank, size, None, False


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_rank_has_the_multipliers_of_its_own_matrices(size):
    model = make_model(torch.float32)
    for label, expected in (("attn", [1.0] * 40), ("mlp", [2.0, 4.0] * 12)):
        optimizers = [optimizer_of(model, SPEC.optimizer, OneOf(rank, size)) for rank in range(size)]
        found = [value for optimizer in optimizers for value in optimizer.multipliers[label].flatten().tolist()]
        assert found == expected


def test_bf16_runs_with_its_gradients_in_bf16():
    model, wide = make_model(torch.bfloat16), make_model(torch.float32)
    wide.load_state_dict({n: p.float() for n, p in model.state_dict().items() if "rotary" not in n}, strict=False)
    starts = {label: p.detach().clone() for label, p in model.named_parameters()}
    optimizers = [optimizer_of(m, SPEC.optimizer, Communicator()) for m in (model, wide)]
    for step in range(4):
        gradients = gradients_of(model, step)
        accumulate(model, gradients)
        accumulate(wide, {label: g.float() for label, g in gradients.items()})
        for optimizer in optimizers:
            optimizer.step(rates_of(step, split_step=3))
    for label, p in model.named_parameters():
        change, expected = p.float() - starts[label].float(), wide.get_parameter(label) - starts[label].float()
        rounding = 2**-8 * starts[label].float().norm()
        assert (change - expected).norm() < 0.1 * expected.norm() + rounding, label


def test_a_missing_gradient_is_named():
    model = make_model(torch.float32)
    optimizer = optimizer_of(model, SPEC.optimizer, Communicator())
    accumulate(model, gradients_of(model, 0))
    model.mlp.grad = None
    with pytest.raises(RuntimeError, match="mlp has no gradient"):
        optimizer.step(rates_of(0))


# --- the plan ---

SMALL = "smear_gate skip_gate attn_gate_bank ve_gate_bank x0_lambdas"
REDUCE = f"attn mlp scalars value_embed bigram_embed {SMALL} lm_head embed"
UPDATE = f"scalars {SMALL} value_embed bigram_embed lm_head embed attn mlp"


def labels(plans: Sequence[ParameterPlan]) -> list[str]:
    return [plan.label for plan in plans]


def test_orders_of_reduction_and_update():
    plan = SPEC.optimizer.step_plan(adam_step=True, tied=None)
    assert (labels(plan.reduce), labels(plan.update)) == (REDUCE.split(), UPDATE.split())
    plan = SPEC.optimizer.step_plan(adam_step=True, tied="embed")
    assert "embed" not in labels(plan.reduce) + labels(plan.update)
    assert len(plan.reduce) == len(plan.update) == 11
    plan = SPEC.optimizer.step_plan(adam_step=False, tied=None)
    assert labels(plan.reduce) == labels(plan.update) == ["attn", "mlp"]


def test_small_neighbours_are_updated_by_one_call():
    plan = SPEC.optimizer.step_plan(adam_step=True, tied=None)
    together = [" ".join(p.label for p in batch) for batch in updated_together(plan.update)]
    small = "scalars smear_gate skip_gate attn_gate_bank ve_gate_bank x0_lambdas"
    assert together == [small, "value_embed", "bigram_embed", "lm_head", "embed", "attn", "mlp"]
    plans = SPEC.optimizer.plans
    apart = [plans[label] for label in ("scalars", "mlp", "smear_gate", "skip_gate", "lm_head", "x0_lambdas")]
    assert [len(batch) for batch in updated_together(apart)] == [1, 1, 2, 1, 1]
    assert [p for batch in updated_together(apart) for p in batch] == apart


def test_what_is_sharded():
    sharded = {label for label, plan in SPEC.optimizer.plans.items() if plan.sharded}
    assert sharded == {"attn", "mlp", "value_embed", "bigram_embed", "lm_head", "embed"}
