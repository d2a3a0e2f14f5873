"""Adam with cautious decay against a loop over numbers, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from nanogpt.optim.adam import adam_step_size, adam_update

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_adam(
    p: list[float], gradients: list[list[float]], lrs: list[float], b1: float, b2: float, eps: float, wd: float
) -> tuple[list[float], list[float], list[float]]:
    """`wd`: weight decay times its multiplier. Returns p, m, v after all steps."""
    p, m, v = list(p), [0.0] * len(p), [0.0] * len(p)
    for n, (g, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        for i in range(len(p)):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            u = m[i] / (math.sqrt(v[i]) + eps) * lr * math.sqrt(1 - b2**n) / (1 - b1**n)
            if u * p[i] > 0:
                u += p[i] * lr**2 * wd
            p[i] -= u
    return p, m, v


def run_adam(p, gradients, lrs, b1, b2, eps, wd):
    m, v = torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p, dtype=torch.float32)
    for n, (g, lr) in enumerate(zip(gradients, lrs, strict=True), start=1):
        step_size = torch.tensor(adam_step_size(lr, (b1, b2), n))
        adam_update(p, g, m, v, step_size, torch.tensor(lr * lr * wd), (b1, b2), eps)
    return p, m, v


# betas, eps, weight decay with its multiplier, size of the gradients
CASES = {
    "head": (0.5, 0.95, 1e-10, 0.75, 1.0),
    "gate": (0.9, 0.99, 1e-10, 0.0, 1.0),
    "table, strong decay": (0.75, 0.95, 1e-10, 2.0, 1.0),
    "gradients of the size of eps": (0.9, 0.99, 1e-10, 0.75, 1e-10),
    "large eps": (0.65, 0.95, 1e-2, 0.75, 1e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_slow_formulation_over_six_steps(case):
    b1, b2, eps, wd, size = CASES[case]
    generator = torch.Generator().manual_seed(0)
    start = 0.5 * torch.randn(40, generator=generator)
    gradients = [size * torch.randn(40, generator=generator) for _ in range(6)]
    lrs = [0.3, 0.3, 0.2, 0.4, 0.1, 0.05]
    expected = slow_adam(start.tolist(), [g.tolist() for g in gradients], lrs, b1, b2, eps, wd)
    found = run_adam(start.clone(), gradients, lrs, b1, b2, eps, wd)
    for got, wanted in zip(found, expected, strict=True):
        assert got.tolist() == pytest.approx(wanted, rel=2e-5, abs=1e-30)


def test_a_bf16_parameter_is_the_fp32_result_rounded_once():
    b1, b2, eps, wd, size = CASES["head"]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, generator=generator).bfloat16()
    gradient = (size * torch.randn(300, generator=generator)).bfloat16()
    expected, _, _ = slow_adam(start.tolist(), [gradient.tolist()], [0.01], b1, b2, eps, wd)
    found, m, v = run_adam(start.clone(), [gradient], [0.01], b1, b2, eps, wd)
    assert found.dtype == torch.bfloat16
    assert m.dtype == v.dtype == torch.float32
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float64).float().bfloat16())


def test_without_gradients_nothing_moves_or_decays():
    p = torch.tensor([1.0, -2.0, 0.0])
    run_adam(p, [torch.zeros(3)] * 2, [0.1] * 2, 0.9, 0.99, 1e-10, 100.0)
    assert p.tolist() == [1.0, -2.0, 0.0]
