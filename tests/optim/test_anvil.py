"""ANVIL's parts and its whole step against loops over numbers and numpy in fp64, and in bf16 to the last bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_normuon import normal, slow_variance_reduction

from nanogpt.optim.anvil import anvil_update, blended_momentum, polar_express_by_gram
from nanogpt.optim.normuon import join_mantissa, nesterov_momentum, reduce_variance

pytestmark = pytest.mark.usefixtures("one_thread")

MAPS = (
    (3.923798038567, -6.095026865488, 3.905234618423),
    (3.278126713798, -3.328923386476, 0.989127286973),
    (3.505298394150, -5.137358782410, 1.968325560615),
    (2.815058591845, -3.685181239622, 1.417196497642),
    (2.245503932403, -2.443826979899, 0.963091710461),
    (2.256537145403, -2.166840097229, 0.929501253245),
)
# Where momentum's warm-up ends, the blend starts, momentum's cooldown starts, the run ends.
STEPS = (0, 1, 239, 240, 241, 512, 513, 514, 515, 1144, 1145, 1193)


def mu_at(step: int) -> float:
    if step < 240:
        return 0.85 + 0.08 * step / 240
    return 0.93 - 0.08 * (step - 1144) / 50 if step > 1144 else 0.93


def blend_at(step: int) -> tuple[float, float]:
    """beta of the fast momentum and its share."""
    return (mu_at(step), 1.0) if step < 514 else (0.85, 0.4385)


def by_singular_values(matrix: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / (1.05 * math.sqrt((matrix**2).sum()) + 1e-6)
    for a, b, c in MAPS:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def slow_anvil(p, g, state, step, *, lr, mult):
    """One step of one matrix, numpy fp64; p and the three arrays of `state` are changed in place."""
    mu, (beta, share) = mu_at(step), blend_at(step)
    fast, slow, second_moment = state
    fast[:] = beta * fast + (1 - beta) * g
    slow[:] = 0.98 * slow + 0.02 * g
    x = by_singular_values((1 - mu) * g + mu * (share * fast + (1 - share) * slow))
    x = slow_variance_reduction(x, second_moment, 0.9)
    for i, j in np.ndindex(p.shape):
        decay = p[i, j] * (2.25 * lr) * (mult * lr) if slow[i, j] * p[i, j] >= 0 else 0.0
        p[i, j] = p[i, j] - mult * lr * x[i, j] - decay


def empty_state(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros((rows, columns)), np.zeros((rows, columns)), np.zeros(max(rows, columns))


def step_of(weight, g, fast, slow, moment, mantissa, step, *, lr, mult):
    """`anvil_update` as the schedule would call it."""
    numbers = {"dtype": fast.dtype}
    anvil_update(
        weight,
        g.clone(),
        fast,
        slow,
        moment,
        mantissa,
        torch.tensor(mu_at(step), **numbers),
        *(torch.tensor(number, **numbers) for number in blend_at(step)),
        torch.full((weight.shape[0], 1, 1), mult * lr, **numbers),
        torch.tensor(2.25 * lr, **numbers),
        0.98,
        0.9,
        MAPS,
        1.05,
    )


@pytest.mark.parametrize(("rows", "columns", "mult"), [(8, 8, 1.0), (16, 4, 4.0), (4, 16, 1.0)])
def test_whole_steps_in_fp64(rows, columns, mult):
    weight = 0.1 * normal(2, rows, columns, seed=90)
    fast, slow = torch.zeros_like(weight), torch.zeros_like(weight)
    moment = torch.zeros((2, rows, 1) if rows >= columns else (2, 1, columns), dtype=torch.float64)
    expected, states = weight.numpy().copy(), [empty_state(rows, columns) for _ in range(2)]
    for n, step in enumerate(STEPS):
        lr, g = 0.023 * (1.5 - 0.1 * n), normal(2, rows, columns, seed=n)
        step_of(weight, g, fast, slow, moment, None, step, lr=lr, mult=mult)
        for matrix, state, gradient in zip(expected, states, g.numpy(), strict=True):
            slow_anvil(matrix, gradient, state, step, lr=lr, mult=mult)
        torch.testing.assert_close(weight, torch.from_numpy(expected), rtol=1e-8, atol=1e-9, msg=f"step {step}")


def test_the_decay_is_gated_by_the_slow_momentum_and_not_by_the_update():
    """After many gradients of one sign, one of the other: the update turns at once, the slow momentum does not."""
    decayed = {}
    for decay in (2.25, 0.0):
        weight = torch.full((1, 2, 2), 3.0, dtype=torch.float64)
        fast, slow, moment = torch.zeros_like(weight), torch.full_like(weight, 0.5), torch.zeros(1, 2, 1).double()
        numbers = [torch.tensor(number).double() for number in (0.93, 0.93, 1.0)]
        arguments = (torch.full((1, 1, 1), 0.1).double(), torch.tensor(decay).double(), 0.98, 0.9, MAPS, 1.05)
        anvil_update(weight, -torch.eye(2)[None].double(), fast, slow, moment, None, *numbers, *arguments)
        decayed[decay] = weight
    assert (decayed[0.0].diagonal(dim1=1, dim2=2) > 3).all()  # the update grows the weight
    torch.testing.assert_close(decayed[0.0] - decayed[2.25], torch.full((1, 2, 2), 3 * 2.25 * 0.1).double())


def test_a_multiplier_of_0_moves_nothing():
    weight = normal(2, 6, 4).bfloat16()
    mantissa = torch.arange(48, dtype=torch.int16).view(2, 6, 4) - 20
    start, low = weight.clone(), mantissa.clone()
    fast, slow, moment = torch.zeros(2, 6, 4), torch.zeros(2, 6, 4), torch.zeros(2, 6, 1)
    for step in range(3):
        step_of(weight, normal(2, 6, 4, seed=step).bfloat16(), fast, slow, moment, mantissa, step, lr=0.02, mult=0.0)
    assert torch.equal(weight, start) and torch.equal(mantissa, low)


# --- momentum ---


def test_before_the_blend_the_momentum_is_normuons_to_the_last_bit():
    fast, slow, one = torch.zeros(50), torch.zeros(50), torch.zeros(50)
    for step in range(4):
        g, mu = normal(50, seed=step).bfloat16(), torch.tensor(mu_at(step))
        assert torch.equal(
            blended_momentum(g, fast, slow, mu, mu, torch.tensor(1.0), 0.98), nesterov_momentum(g, one, mu)
        )
    assert torch.equal(fast, one)
    expected = sum(0.02 * 0.98 ** (3 - step) * normal(50, seed=step).bfloat16().double() for step in range(4))
    torch.testing.assert_close(slow.double(), expected, rtol=1e-5, atol=1e-7)  # it has filled all the same


# --- Polar Express ---


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (40, 10), (10, 40)])
@pytest.mark.parametrize("size", [1.0, 1e3, 3e-7])
def test_equals_the_map_of_singular_values(rows, columns, size):
    """3e-7: the floor of the norm counts."""
    g = size * normal(3, rows, columns)
    for got, matrix in zip(polar_express_by_gram(g, MAPS, 1.05), g.numpy(), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(by_singular_values(matrix)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (24, 16), (16, 24)])
def test_bf16_rounds_matrix_and_first_gram_matrix_once_each(rows, columns):
    """The sum of the trace is exact in fp32, its terms being bf16."""
    g = normal(2, rows, columns).bfloat16()
    x = g if rows <= columns else g.mT  # then X X^T either way
    gram = torch.bmm(x, x.mT)
    divisor = 1.05 * gram.float().diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None] + 1e-6
    x, gram = (x.float() / divisor).bfloat16(), (gram.float() / divisor**2).bfloat16()
    for a, b, c in MAPS:
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
        gram = torch.bmm(x, x.mT)
    found = polar_express_by_gram(g, MAPS, 1.05)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found if rows <= columns else found.mT, x)


def test_singular_values_from_three_thousandths_on_become_one():
    """In exact arithmetic, up to the largest that the margin lets through, 1 / 1.05; from 0.9526 on they diverge."""
    s = np.geomspace(3e-3, 1 / 1.05, 2000)
    for a, b, c in MAPS:
        s = a * s + b * s**3 + c * s**5
    assert s.min() == pytest.approx(0.99507, abs=1e-5)
    assert s.max() == pytest.approx(1.00040, abs=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(24, 8), (24, 24), (8, 24)])
def test_rank_one_in_bf16_needs_a_little_more_margin(rows, columns):
    """Rounding can lift the only singular value over 0.9526 with 1.05, in a third of these; with 1.055 it cannot."""
    g = (normal(60, rows, 1) @ normal(60, 1, columns, seed=1)).bfloat16()
    largest = torch.linalg.matrix_norm(polar_express_by_gram(g, MAPS, 1.055).float(), 2)
    assert largest.max() < 1.01
    assert not (polar_express_by_gram(g, MAPS, 1.05).float().square().sum((1, 2)) < 2).all()


def test_zero_stays_zero():
    assert not polar_express_by_gram(torch.zeros(1, 6, 4).bfloat16(), MAPS, 1.05).any()


# --- bf16 ---


def test_bf16_weights_are_fp32_weights_to_the_last_bit():
    """Momenta, update and decay of bf16 weights with lower halves are numpy's in fp32, across the blend's start."""
    shape, lr, mult = (2, 24, 8), np.float32(0.01), np.float32(2)
    weight = (0.05 * normal(*shape, seed=5)).bfloat16()
    mantissa = torch.zeros(shape, dtype=torch.int16)
    fast, slow, moment = torch.zeros(shape), torch.zeros(shape), torch.zeros(2, 24, 1)
    p, f, s, second_moment = weight.float().numpy(), np.zeros(shape, "f"), np.zeros(shape, "f"), moment.clone()
    one = np.float32(1)
    for n, step in enumerate((511, 512, 513, 514, 515, 516)):
        gradient = normal(*shape, seed=n).bfloat16()
        step_of(weight, gradient, fast, slow, moment, mantissa, step, lr=float(lr), mult=float(mult))
        g, mu = gradient.float().numpy(), np.float32(mu_at(step))
        beta, share = map(np.float32, blend_at(step))
        f += (g - f) * (one - beta)
        s += (g - s) * np.float32(0.02)
        u = g + (share * f + (one - share) * s - g) * mu
        x = reduce_variance(polar_express_by_gram(torch.from_numpy(u).bfloat16(), MAPS, 1.05), second_moment, 0.9)
        decay = np.where(s * p >= 0, p * np.float32(2.25 * float(lr)), np.float32(0))
        p = p - np.float32(float(mult) * float(lr)) * (x.float().numpy() + decay)
        assert np.array_equal(fast.numpy(), f) and np.array_equal(slow.numpy(), s), step
        assert np.array_equal(join_mantissa(weight, mantissa).numpy(), p), step
    assert not torch.equal(weight.float(), torch.from_numpy(p)), "the lower halves count"


def test_bf16_steps_follow_fp64_up_to_the_rounding_of_the_orthogonalization():
    weight = (0.05 * normal(1, 48, 12, seed=5)).bfloat16()
    start = weight.double()
    expected, state = start[0].numpy().copy(), empty_state(48, 12)
    fast, slow, moment = torch.zeros(1, 48, 12), torch.zeros(1, 48, 12), torch.zeros(1, 48, 1)
    mantissa = torch.zeros(1, 48, 12, dtype=torch.int16)
    for n, step in enumerate((512, 513, 514, 515)):
        g = normal(1, 48, 12, seed=n).bfloat16()
        step_of(weight, g, fast, slow, moment, mantissa, step, lr=0.003, mult=2.0)
        slow_anvil(expected, g[0].double().numpy(), state, step, lr=0.003, mult=2.0)
    moved = join_mantissa(weight, mantissa)[0].double() - start[0]
    change = torch.from_numpy(expected) - start[0]
    assert (moved - change).norm() < 0.03 * change.norm()
