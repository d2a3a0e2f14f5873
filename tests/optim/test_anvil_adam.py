"""Record 92's optimizer on a made-up table of parameters, against the rules label by label in fp64; its cadence."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from test_anvil import MAPS, STEPS, blend_at, empty_state, mu_at, slow_anvil
from torch import nn

from nanogpt.optim.anvil_adam.optimizer import AnvilAdam
from nanogpt.optim.anvil_adam.spec import AnvilAdamRates, AnvilAdamSpec
from nanogpt.optim.communication import Communicator
from nanogpt.optim.optimizer_spec import TableRates
from nanogpt.parameters import Adam, NorMuon, Parameter, TransposeOf
from nanogpt.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 12
# The second and the last pair of matrices of `mlp` are frozen.
ROWS = (
    Parameter("scalars", (5,), Adam((0.9, 0.99), 5), update=4, dtype="fp32"),
    Parameter("qk", (4, 6, WIDTH), NorMuon(6), update=1),
    Parameter("vo", (4, WIDTH, WIDTH), NorMuon(WIDTH), update=1),
    Parameter("mlp", (4, 2, 24, WIDTH), NorMuon(24, (1, 2, 0, 0)), update=5),
    Parameter("value_embed", (16, WIDTH), Adam((0.75, 0.95), 70, 5, sharded=True, cyclic=True), update=3),
    Parameter("lm_head", (WIDTH, 16), Adam((0.5, 0.95), 1, 150, sharded=True), update=2),
    Parameter(
        "embed",
        (16, WIDTH),
        Adam((0.5, 0.95), 1, 150, sharded=True),
        TransposeOf("lm_head"),
        update=2,
        tied_to="lm_head",
    ),
)
BANKS = {"qk": (6, [1.0] * 4), "vo": (WIDTH, [1.0] * 4), "mlp": (24, [math.sqrt(2), math.sqrt(8), 0.0, 0.0] * 2)}
# betas, lr_mul, wd_mul
ADAM = {
    "scalars": (0.9, 0.99, 5, 0),
    "value_embed": (0.75, 0.95, 70, 5),
    "lm_head": (0.5, 0.95, 1, 150),
    "embed": (0.5, 0.95, 1, 150),
}
FIRST_STEPS = (0, 320, 681, 1107, 1174)
TOTAL_STEPS = 1194
# Around the ends of momentum's warm-up and cooldown, the second cadence's, the blend's and the split's starts; all of
# a cycle's steps where its event is among them.
RUN = [
    *range(238, 242),
    *range(330, 348),
    *range(512, 518),
    *range(1142, 1148),
    *range(1174, 1178),
    *range(1188, 1194),
]


def make_spec(**changes: Any) -> AnvilAdamSpec:
    """The record's numbers."""
    spec = {
        "kind": "anvil_adam",
        "adam": {"lr": 0.008, "eps": 1e-10, "weight_decay": 0.005, "every": 2},
        "anvil": {
            "lr": 0.023,
            "beta2": 0.9,
            "weight_decay": 2.25,
            "momentum": {"low": 0.85, "high": 0.93, "warmup_steps": 240, "cooldown_steps": 50},
            "slow_momentum": {"beta": 0.98, "from_step": 514, "fast_share": 0.4385, "fast_beta": 0.85},
            "norm_margin": 1.05,
            "polar_express": list(MAPS),
        },
        "tables": {"every": 2, "then_every": 4, "from_step": 336},
        "row_adam": {"lr_mul": 70, "beta2": 0.95, "wd_mul": 5, "eps": 1e-10},
        "tied_head": {"split_stage": 4},
    }
    for key, default in AnvilAdamSpec.defaults(ROWS).items():
        spec[key] = {**default, **spec.get(key, {})} if isinstance(default, dict) else default
    for path, value in changes.items():
        part, key = path.split("__")
        spec[part] = {**spec[part], key: value}
    return AnvilAdamSpec.model_validate(spec)


SPEC = make_spec()


def make_model(dtype: torch.dtype = torch.float64) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterDict(
        {
            row.name: 0.3
            * torch.randn(row.shape, generator=generator).to(torch.float32 if row.dtype == "fp32" else dtype)
            for row in ROWS
        }
    )
    with torch.no_grad():
        model["embed"].copy_(model["lm_head"].mT)
    return model


def factor_at(step: int) -> float:
    return 1 + 0.5 * math.sin(step)


def rates_of(step: int, spec: AnvilAdamSpec = SPEC) -> AnvilAdamRates:
    return spec.rates(step, factor_at(step), first_steps=FIRST_STEPS, total_steps=TOTAL_STEPS)


def gradients_of(model: nn.ParameterDict, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {label: torch.randn(p.shape, generator=generator).to(p.dtype) for label, p in model.items()}


def accumulate(model: nn.ParameterDict, step: int) -> None:
    for label, gradient in gradients_of(model, step).items():
        p = model[label]
        p.grad = gradient if p.grad is None else p.grad + gradient


def is_event(step: int) -> bool:
    return step % 2 == 1 if step < 336 else step % 4 == 3


class SlowOptimizer:
    """By the rules of the record, parameter by parameter, in fp64; its gradients are sums since the last update."""

    def __init__(self, model: nn.ParameterDict):
        self.now = {label: p.detach().double().clone() for label, p in model.items()}
        self.sums = {label: torch.zeros_like(self.now[label]) for label in ADAM}
        self.moments = {label: [torch.zeros_like(self.now[label]) for _ in range(2)] for label in ADAM}
        self.counts = dict.fromkeys(ADAM, 0)
        self.tied = True
        self.banks = {
            label: (self.now[label].numpy().reshape(len(muls), rows, WIDTH), muls)
            for label, (rows, muls) in BANKS.items()
        }
        self.bank_states = {
            label: [empty_state(*matrix.shape) for matrix in matrices] for label, (matrices, _) in self.banks.items()
        }

    def step(self, gradients: dict[str, torch.Tensor], step: int) -> None:
        factor = factor_at(step)
        for label, (matrices, muls) in self.banks.items():
            gs = gradients[label].double().numpy().reshape(matrices.shape)
            for p, g, state, mult in zip(matrices, gs, self.bank_states[label], muls, strict=True):
                slow_anvil(p, g, state, step, lr=0.023 * factor, mult=mult)
        for label in ADAM:
            self.sums[label] += gradients[label].double()
        if is_event(step):
            late = step >= 336
            betas, wd = ((0.5625, 0.9025), 10) if late else ((0.75, 0.95), 5)
            self.adam("value_embed", betas, 0.008 * 70 * factor, wd)
        if step % 2 == 1:
            self.adam("scalars", (0.9, 0.99), 0.008 * 5 * factor, 0)
            if self.tied:
                self.sums["lm_head"] += self.sums["embed"].T
                self.sums["embed"].zero_()
            self.adam("lm_head", (0.5, 0.95), 0.008 * factor, 150)
            if self.tied:
                self.now["embed"] = self.now["lm_head"].T.clone()
            else:
                self.adam("embed", (0.5, 0.95), 0.008 * factor, 150)
            if step == 1175:
                self.tied, self.counts["embed"] = False, self.counts["lm_head"]
                self.moments["embed"] = [moment.T.clone() for moment in self.moments["lm_head"]]

    def adam(self, label: str, betas: tuple[float, float], lr: float, wd: float) -> None:
        (b1, b2), g, p = betas, self.sums[label], self.now[label]
        self.counts[label] += 1
        n, (m, v) = self.counts[label], self.moments[label]
        m.mul_(b1).add_((1 - b1) * g)
        v.mul_(b2).add_((1 - b2) * g * g)
        u = m / (v.sqrt() + 1e-10) * lr * math.sqrt(1 - b2**n) / (1 - b1**n)
        self.now[label] = p - u - torch.where(u * p > 0, p * lr**2 * 0.005 * wd, torch.zeros_like(p))
        self.sums[label].zero_()


def test_the_steps_that_matter():
    model = make_model()
    optimizer, slow = AnvilAdam(model, ROWS, SPEC, Communicator()), SlowOptimizer(model)
    start = {label: p.detach().double().clone() for label, p in model.items()}
    before = dict(start)
    for step in RUN:
        accumulate(model, step)
        slow.step(gradients_of(model, step), step)
        optimizer.step(rates_of(step))
        for label, p in model.items():
            change, expected = p.detach().double() - start[label], slow.now[label] - start[label]
            rounding = 2**-22 * start[label].norm()  # of the update's arithmetic in fp32
            assert (change - expected).norm() <= 1e-4 * expected.norm() + rounding, (step, label)
            due = label in BANKS or (is_event(step) if label == "value_embed" else step % 2 == 1)
            assert torch.equal(p, before[label]) != due, (step, label)
            assert (p.grad is None) == due, (step, label)
            before[label] = p.detach().clone()
    events = sum(map(is_event, RUN))
    odd = sum(step % 2 for step in RUN)
    assert events < odd
    assert optimizer.adam_counts == {"scalars": odd, "value_embed": events, "lm_head": odd, "embed": odd}
    assert optimizer.gathering == {"value_embed"}, "the last two steps' gradients are dropped"
    frozen = model["mlp"].detach()[1::2], start["mlp"][1::2]
    assert torch.equal(*frozen) and not torch.equal(model["mlp"][::2], start["mlp"][::2])


# --- the schedule ---


def test_the_recipe_has_these_numbers():
    recipe, bank = load_recipe("record92").optimizer, {"groups"}
    assert recipe.anvil.model_dump(exclude=bank) == SPEC.anvil.model_dump(exclude=bank)
    assert recipe.adam.model_dump(exclude=bank) == SPEC.adam.model_dump(exclude=bank)
    assert (recipe.tables, recipe.row_adam) == (SPEC.tables, SPEC.row_adam)


def test_events():
    events = [step for step in range(1194) if SPEC.is_event(step)]
    assert events == [step for step in range(1194) if is_event(step)]
    assert len(events) == 382
    assert events[:2] == [1, 3] and events[167:170] == [335, 339, 343] and events[-1] == 1191
    assert all(rates_of(step).event == is_event(step) for step in range(1194))
    assert [rates_of(step).repeat for step in (0, 335, 336, 339, 1193)] == [1, 1, 2, 2, 2]
    assert SPEC.steps_between_updates == 4
    assert SPEC.warmup_steps([0, 320, 681, 965, 1174, 1180]) == [339]  # compiles betas of its own


@pytest.mark.parametrize("step", STEPS)
def test_momenta(step: int):
    rates = rates_of(step)
    assert rates.momentum == pytest.approx(mu_at(step), abs=1e-12)
    assert (rates.fast_beta, rates.fast_share) == pytest.approx(blend_at(step), abs=1e-12)


def test_the_last_momentum():
    assert rates_of(1193).momentum == pytest.approx(0.8516)


@pytest.mark.parametrize(("step", "beta2", "decay"), [(335, 0.95, 5), (336, 0.9025, 10), (1191, 0.9025, 10)])
def test_rates_of_tables(step: int, beta2: float, decay: float):
    lr = 0.008 * factor_at(step) * 70
    expected = (lr, beta2, lr**2 * 0.005 * decay, 1e-10)
    assert rates_of(step).table == SPEC.table_rates(step, factor_at(step)) == pytest.approx(expected)
    assert make_spec().model_copy(update={"row_adam": None}).table_rates(step, 1.0) is None


def test_a_shortened_run_keeps_its_shares():
    short = AnvilAdamSpec.model_validate(SPEC.shortened(lambda steps: round(steps / 6), 199))
    assert (short.anvil.momentum.warmup_steps, short.anvil.momentum.cooldown_steps) == (40, 8)
    assert short.anvil.slow_momentum.from_step == 86
    assert (short.tables.every, short.tables.then_every, short.tables.from_step) == (2, 4, 56)
    short = AnvilAdamSpec.model_validate(SPEC.shortened(lambda steps: round(steps / 8), 149))
    assert short.tables.from_step == 40  # 42 is not a multiple of four
    assert not list(short.problems(ROWS, world_size=1, stages=5, total_steps=149))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tables__then_every": 3}, "must be a multiple of every, 2"),
        ({"tables__from_step": 338}, "is 338, must be a multiple of then_every, 4"),
        ({"tables__groups": ["lm_head"]}, "lm_head: can be any of scalars, value_embed"),
        ({"tables__groups": ["qk"]}, "qk: can be any of scalars, value_embed"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], expected: str):
    problems = list(make_spec(**change).problems(ROWS, world_size=1, stages=5, total_steps=TOTAL_STEPS))
    assert len(problems) == 1
    (path, message), ((changed, _),) = problems[0], [key.split("__") for key in change]
    assert path[0] == changed
    assert re.search(expected, message), message


# --- tables that are not parameters ---


class FakeTable:
    """Writes down what it is told."""

    def __init__(self, log: list[Any]):
        self.log, self.updates = log, 0

    def start_push(self) -> None:
        self.log.append("push")

    def update(self, rates: TableRates) -> None:
        self.updates += 1
        self.log.append(rates)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> tuple[AnvilAdam, nn.ParameterDict, list[Any]]:
    """An optimizer with a table, and what it does in its order."""
    log: list[Any] = []
    together = Communicator.average_together
    reduce, banks, adam = AnvilAdam._start_reduction, AnvilAdam._update_bank, AnvilAdam._update_adam

    def started(self, plan, gradient):
        log.append(f"reduce {plan.label}")
        return reduce(self, plan, gradient)

    def averaged(self, tensors):
        log.append(f"reduce {len(tensors)} small")
        return together(self, tensors)

    def bank(self, label, *arguments):
        log.append(label)
        banks(self, label, *arguments)

    def others(self, labels, *arguments):
        log.extend(labels)
        adam(self, labels, *arguments)

    monkeypatch.setattr(AnvilAdam, "_start_reduction", started)
    monkeypatch.setattr(Communicator, "average_together", averaged)
    monkeypatch.setattr(AnvilAdam, "_update_bank", bank)
    monkeypatch.setattr(AnvilAdam, "_update_adam", others)
    model = make_model(torch.float32)
    return AnvilAdam(model, ROWS, SPEC, Communicator(), tables={"ngrams": FakeTable(log)}), model, log


def test_tables_push_behind_all_reductions_and_are_updated_last(logged):
    optimizer, model, log = logged
    reduced = ["reduce 1 small", "reduce qk", "reduce vo", "reduce mlp"]
    for step in (336, 337, 338, 339):
        log.clear()
        accumulate(model, step)
        optimizer.step(rates_of(step))
        if step % 2 == 0:
            assert log == ["reduce qk", "reduce vo", "reduce mlp", "qk", "vo", "mlp"]
        elif step == 337:
            assert log == [*reduced, "reduce lm_head", "qk", "vo", "lm_head", "scalars", "mlp"]
        else:
            table = SPEC.table_rates(339, factor_at(339))
            assert log == [
                *(*reduced, "reduce value_embed", "reduce lm_head", "push"),
                *("qk", "vo", "lm_head", "value_embed", "scalars", "mlp", table),
            ]


def test_tables_are_part_of_the_state(logged):
    optimizer, model, _ = logged
    for step in range(4):
        accumulate(model, step)
        optimizer.step(rates_of(step))
    state = optimizer.state_dict()
    assert state["tables"] == {"ngrams": {"updates": 2}}
    twin = AnvilAdam(make_model(torch.float32), ROWS, SPEC, Communicator(), tables={"ngrams": FakeTable([])})
    twin.load_state_dict(state)
    assert twin.tables["ngrams"].updates == 2


# --- checkpoints ---


def test_it_goes_on_in_the_middle_of_a_cycle_bit_for_bit():
    model = make_model(torch.bfloat16)
    optimizer = AnvilAdam(model, ROWS, SPEC, Communicator())
    for step in range(330, 348):
        accumulate(model, step)
        optimizer.step(rates_of(step))
        state = optimizer.state_dict()
        waiting = {*ADAM} if step % 2 == 0 else set() if is_event(step) else {"value_embed"}
        assert set().union(*state["pending_gradients"]) == waiting, step
        twin = make_model(torch.bfloat16)
        twin.load_state_dict(model.state_dict())
        model, optimizer = twin, AnvilAdam(twin, ROWS, SPEC, Communicator())
        optimizer.load_state_dict(state)
    whole = make_model(torch.bfloat16)
    optimizer = AnvilAdam(whole, ROWS, SPEC, Communicator())
    for step in range(330, 348):
        accumulate(whole, step)
        optimizer.step(rates_of(step))
    for label, p in whole.items():
        assert torch.equal(p, model[label]), label


def test_one_rank_goes_on_with_the_mean_of_two():
    """In the middle of a cycle, of the cyclic gradient alone."""
    optimizers = [AnvilAdam(make_model(torch.float32), ROWS, SPEC, Communicator()) for _ in range(3)]
    states = []
    for number, optimizer in enumerate(optimizers[:2]):
        for step in (336, 337):
            for label, gradient in gradients_of(make_model(torch.float32), step + 1000 * number).items():
                p = optimizer.parameters[label]
                p.grad = gradient if p.grad is None else p.grad + gradient
            optimizer.step(rates_of(step))
        states.append(optimizer.state_dict())
    both = {**states[0], "pending_gradients": [state["pending_gradients"][0] for state in states]}
    optimizers[2].load_state_dict(both)
    gradients = [optimizer.parameters["value_embed"].grad for optimizer in optimizers]
    assert all(gradient is not None for gradient in gradients)
    assert np.allclose(gradients[2], (gradients[0] + gradients[1]) / 2)
    assert optimizers[2].gathering == {"value_embed"}
    assert optimizers[2].parameters["lm_head"].grad is None


def test_a_warm_up_leaves_everything_as_it_is_and_meets_every_kind_of_update(monkeypatch: pytest.MonkeyPatch):
    model = make_model(torch.float32)
    optimizer = AnvilAdam(model, ROWS, SPEC, Communicator())
    start, calls, update = {label: p.detach().clone() for label, p in model.items()}, [], optimizer._adam
    monkeypatch.setattr(optimizer, "_adam", lambda *a: (calls.append((tuple(a[0][0].shape), a[6][0])), update(*a)))
    optimizer.warm_up(2)
    assert {betas for shape, betas in calls if shape == (8, WIDTH)} >= {(0.75, 0.95), (0.5625, 0.9025)}
    assert all(torch.equal(p, start[label]) for label, p in model.items())
    assert not any(state["exp_avg"].any() for state in optimizer.state.values() if "exp_avg" in state)
