"""Record 89's optimizer over steps of a small model, against the rules label by label in fp64; its plan."""

from __future__ import annotations

import pytest
import torch
from small_specs import randomize, small_record89
from test_normuon_adam import SlowOptimizer, accumulate, gradients_of, rates_of

from nanogpt.models.language_model import Implementations
from nanogpt.models.record89.model import Record89
from nanogpt.optim.communication import Communicator
from nanogpt.optim.normuon_adam.optimizer import NorMuonAdam

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = small_record89(head_dim=4, overrides=["model.mudd.hidden=8", "model.bigram_rows=40"])

# betas, lr_mul, wd_mul
ADAM: dict[str, tuple[float, float, float, float]] = {
    "scalars": (0.9, 0.99, 5, 0),
    "smear_gate": (0.9, 0.99, 0.01, 0),
    "ve_gate_bank": (0.9, 0.99, 1, 1),
    "lm_head": (0.5, 0.95, 1, 150),
    "embed": (0.5, 0.95, 1, 150),
    "value_embed": (0.75, 0.95, 75, 5),
    "bigram_embed": (0.75, 0.95, 75, 5),
    "post_lambdas": (0.9, 0.95, 1, 0),
    "resid_lambdas": (0.9, 0.95, 5, 0),
    "mudd_w1": (0.9, 0.99, 0.25, 1),
    "mudd_w2": (0.9, 0.99, 0.25, 1),
    "mudd_b2": (0.9, 0.99, 0.25, 0),
    "mudd_gate_w1": (0.9, 0.99, 0.1, 1),
    "mudd_gate_w2": (0.9, 0.99, 0.1, 1),
    "mudd_gate_b2": (0.9, 0.99, 0.1, 0),
    "mudd_gate_scale": (0.9, 0.99, 0.1, 0),
}
BANKS: dict[str, tuple[int, tuple[float, ...]]] = {"qk": (8, (1.0,)), "vo": (24, (1.0,)), "mlp": (96, (2.0, 4.0))}


def make_model(dtype: torch.dtype = torch.float64) -> Record89:
    model = Record89(SPEC.model, dtype=dtype, max_tokens=16, implementations=Implementations())
    model.draw_parameters(torch.Generator().manual_seed(0))
    randomize(model)
    with torch.no_grad():
        model.embed.copy_(model.lm_head.mT)
    return model


def test_six_steps_with_the_split_in_the_fourth():
    model = make_model()
    optimizer, slow = (
        NorMuonAdam(model, model.rows, SPEC.optimizer, Communicator()),
        SlowOptimizer(model, ADAM, BANKS, beta2=0.9),
    )
    assert {name for name, _ in model.named_parameters()} == ADAM.keys() | BANKS.keys()
    for step in range(6):
        gradients, rates = gradients_of(model, step), rates_of(step, split_step=3)
        accumulate(model, gradients)
        optimizer.step(rates)
        slow.step(gradients, rates)
        for label, p in model.named_parameters():
            change, expected = p.detach().double() - slow.start[label], slow.now[label] - slow.start[label]
            rounding = 2**-23 * slow.start[label].norm()  # of the update's arithmetic in fp32
            assert (change - expected).norm() <= 1e-4 * expected.norm() + rounding, (step, label)
        assert torch.equal(model.embed, model.lm_head.mT) == (step < 5), step


def test_q_and_k_are_orthogonalized_by_pairs_of_heads_and_v_and_o_whole():
    model = make_model(torch.float32)
    optimizer = NorMuonAdam(model, model.rows, SPEC.optimizer, Communicator())
    shapes = {label: tuple(optimizer.state[label]["momentum"].shape) for label in BANKS}
    assert shapes == {"qk": (64, 8, 24), "vo": (24, 24, 24), "mlp": (24, 96, 24)}
    # q and k have fewer rows than columns: the variance is kept by column.
    shapes = {label: tuple(optimizer.state[label]["second_moment"].shape) for label in BANKS}
    assert shapes == {"qk": (64, 1, 24), "vo": (24, 24, 1), "mlp": (24, 96, 1)}


def test_padding_without_gradients_stays_as_it_is_or_only_decays():
    model = make_model(torch.float32)
    model.draw_parameters(torch.Generator().manual_seed(0))
    starts = {label: model.get_parameter(label).detach().clone() for label in BANKS}
    assert not starts["qk"][60:].any() and not starts["vo"][20:].any()
    optimizer = NorMuonAdam(model, model.rows, SPEC.optimizer, Communicator())
    for step in range(2):
        for label, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            if label in BANKS:
                p.grad[{"qk": 60, "vo": 20, "mlp": 11}[label] :] = 0
        optimizer.step(rates_of(step))
    assert not model.qk[60:].any() and not model.vo[20:].any() and not model.mlp[11, 1].any()
    shrunk = model.mlp[11, 0] / starts["mlp"][11, 0]
    assert shrunk.min() > 0.9 and shrunk.max() < 1


SMALL = "mudd_b2 mudd_gate_b2 mudd_gate_scale"
REDUCE = (
    "qk vo mlp scalars smear_gate ve_gate_bank lm_head bigram_embed post_lambdas resid_lambdas value_embed embed"
    " mudd_w1 mudd_w2 mudd_b2 mudd_gate_w1 mudd_gate_w2 mudd_gate_b2 mudd_gate_scale"
)
UPDATE = (
    f"scalars smear_gate ve_gate_bank {SMALL} post_lambdas resid_lambdas mudd_w2 mudd_gate_w2 value_embed bigram_embed"
    " mudd_w1 mudd_gate_w1 lm_head embed qk vo mlp"
)


def test_orders_of_reduction_and_update_and_what_is_sharded():
    plan = SPEC.optimizer.step_plan(adam_step=True, tied=None)
    assert [p.label for p in plan.reduce] == REDUCE.split()
    assert [p.label for p in plan.update] == UPDATE.split()
    plan = SPEC.optimizer.step_plan(adam_step=False, tied=None)
    assert [p.label for p in plan.reduce] == [p.label for p in plan.update] == ["qk", "vo", "mlp"]
    sharded = {label for label, plan in SPEC.optimizer.plans.items() if plan.sharded}
    assert sharded == {"qk", "vo", "mlp", "value_embed", "bigram_embed", "lm_head", "embed"}
