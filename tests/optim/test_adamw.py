"""AdamW of the baseline against a loop over numbers: clipping, decay of matrices only, the schedule's factor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nanogpt.optim.adamw.optimizer import AdamW
from nanogpt.optim.communication import Communicator
from nanogpt.optim.optimizer_spec import Rates
from nanogpt.parameters import Decoupled, Parameter
from nanogpt.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = load_recipe("gpt2").optimizer


@pytest.mark.parametrize("size", [0.01, 30.0])
def test_equals_the_slow_formulation(size):
    """The global norm is about 0.03 (not clipped) and 90 (clipped to 1)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    rows = [Parameter(name, tuple(p.shape), Decoupled(p.ndim > 1)) for name, p in model.named_parameters()]
    optimizer = AdamW(model, rows, SPEC, Communicator())
    p = {name: value.flatten().tolist() for name, value in model.named_parameters()}
    m = {name: [0.0] * len(values) for name, values in p.items()}
    v = {name: [0.0] * len(values) for name, values in p.items()}
    for n, factor in enumerate((0.01, 1.0, 0.5), start=1):
        gradients = {name: size * torch.randn_like(value) for name, value in model.named_parameters()}
        for name, value in model.named_parameters():
            value.grad = gradients[name].clone()
        optimizer.step(Rates(lr_factor=factor))
        assert all(value.grad is None for value in model.parameters())

        g = {name: value.flatten().tolist() for name, value in gradients.items()}
        norm = math.sqrt(sum(x * x for values in g.values() for x in values))
        lr = 0.0006 * factor
        for name, decay in (("weight", 0.1), ("bias", 0.0)):
            for i, raw in enumerate(g[name]):
                x = raw * min(1, 1 / norm)
                m[name][i] = 0.9 * m[name][i] + 0.1 * x
                v[name][i] = 0.95 * v[name][i] + 0.05 * x * x
                root = math.sqrt(v[name][i] / (1 - 0.95**n)) + 1e-8
                p[name][i] -= lr * decay * p[name][i] + lr * m[name][i] / (1 - 0.9**n) / root
            assert model.get_parameter(name).flatten().tolist() == pytest.approx(p[name], rel=1e-6)
