"""NorMuon's parts and its whole step against loops over numbers and numpy in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_polar_express import COEFFICIENTS, by_singular_values

from nanogpt.optim.normuon import (
    cautious_update,
    join_mantissa,
    nesterov_momentum,
    normuon_update,
    reduce_variance,
    split_mantissa,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_variance_reduction(x: np.ndarray, s: np.ndarray, beta2: float) -> np.ndarray:
    """One matrix; `s`, one number a row (a column if there are more of those), is changed."""
    rows, columns = x.shape
    scaled = x.copy()
    if rows >= columns:
        for i in range(rows):
            s[i] = beta2 * s[i] + (1 - beta2) * sum(x[i] ** 2) / columns
            scaled[i] /= math.sqrt(max(s[i], 1e-10))
    else:
        for j in range(columns):
            s[j] = beta2 * s[j] + (1 - beta2) * sum(x[:, j] ** 2) / rows
            scaled[:, j] /= math.sqrt(max(s[j], 1e-10))
    return scaled * (math.sqrt((x**2).sum()) / max(math.sqrt((scaled**2).sum()), 1e-10))


def slow_step(p, g, momentum, s, *, mu, lr, mult, beta2=0.95, weight_decay=1.2):
    """One step of one matrix, numpy fp64; all but `g` are changed in place."""
    momentum += (1 - mu) * (g - momentum)
    x = by_singular_values(torch.from_numpy((1 - mu) * g + mu * momentum)).numpy()
    x = slow_variance_reduction(x, s, beta2)
    for i, j in np.ndindex(p.shape):
        decay = p[i, j] * (weight_decay * lr) * (mult * lr) if x[i, j] * p[i, j] >= 0 else 0.0
        p[i, j] = p[i, j] - mult * lr * x[i, j] - decay


def test_nesterov_momentum():
    momentum = torch.zeros(3, dtype=torch.float64)
    m = [0.0, 0.0, 0.0]
    for step, mu in enumerate((0.85, 0.9, 0.95)):
        g = normal(3, seed=step)
        update = nesterov_momentum(g, momentum, torch.tensor(mu, dtype=torch.float64))
        m = [mu * a + (1 - mu) * b for a, b in zip(m, g.tolist(), strict=True)]
        assert momentum.tolist() == pytest.approx(m)
        assert update.tolist() == pytest.approx([(1 - mu) * b + mu * a for a, b in zip(m, g.tolist(), strict=True)])


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (12, 5), (5, 12)])
def test_variance_reduction_over_three_steps(rows, columns):
    shape = (2, rows, 1) if rows >= columns else (2, 1, columns)
    moment = torch.zeros(shape, dtype=torch.float64)
    slow_moment = np.zeros((2, max(rows, columns)))
    for step in range(3):
        # Rows and columns of very different sizes.
        x = normal(2, rows, columns, seed=step) * torch.logspace(-1, 1, rows)[:, None] * torch.logspace(-1, 1, columns)
        x = x.double()
        got = reduce_variance(x, moment, 0.95)
        for n in range(2):
            expected = slow_variance_reduction(x[n].numpy(), slow_moment[n], 0.95)
            torch.testing.assert_close(got[n], torch.from_numpy(expected))
            assert got[n].norm().item() == pytest.approx(x[n].norm().item())
        assert np.allclose(moment.flatten(1).numpy(), slow_moment)


def test_variance_reduction_of_tiny_rows_and_of_nothing():
    """A mean square below 1e-10 counts as 1e-10; a zero matrix stays zero."""
    x = torch.cat((normal(1, 4, 4) * torch.tensor([1e-7, 1e-5, 1e-3, 1.0])[:, None], torch.zeros(1, 4, 4)))
    slow_moment = np.zeros(4)
    got = reduce_variance(x, torch.zeros(2, 4, 1, dtype=torch.float64), 0.95)
    torch.testing.assert_close(got[0], torch.from_numpy(slow_variance_reduction(x[0].numpy(), slow_moment, 0.95)))
    assert (slow_moment[:2] < 1e-10).all()
    assert not got[1].any()


def test_statistics_of_bf16_are_fp32():
    x = normal(1, 32, 32).bfloat16()
    moment = torch.zeros(1, 32, 1)
    got = reduce_variance(x, moment, 0.95)
    assert got.dtype == torch.bfloat16
    slow_moment = np.zeros(32)
    expected = slow_variance_reduction(x[0].double().numpy(), slow_moment, 0.95)
    assert moment.flatten().tolist() == pytest.approx(slow_moment.tolist(), rel=1e-5)
    assert (got[0].double().numpy() == torch.from_numpy(expected).bfloat16().double().numpy()).mean() > 0.99


def test_cautious_decay_acts_where_signs_do_not_disagree():
    weight = torch.tensor([[[2.0, 2.0, -2.0, -2.0, 2.0, 0.0]]], dtype=torch.float64)
    x = torch.tensor([[[1.0, -1.0, 1.0, -1.0, 0.0, 1.0]]], dtype=torch.float64)
    step_size = torch.tensor([[[0.5]]], dtype=torch.float64)  # multiplier * lr
    got = cautious_update(weight, x, x, step_size, torch.tensor(0.1, dtype=torch.float64))  # weight decay * lr
    assert got.flatten().tolist() == pytest.approx([1.4, 2.5, -2.5, -1.4, 1.9, -0.5])


@pytest.mark.parametrize(("rows", "columns", "mult"), [(8, 8, 1.0), (16, 4, 4.0), (4, 16, 1.0)])
def test_whole_steps_in_fp64(rows, columns, mult):
    weight = 0.1 * normal(2, rows, columns, seed=9)
    momentum = torch.zeros_like(weight)
    moment = torch.zeros((2, rows, 1) if rows >= columns else (2, 1, columns), dtype=torch.float64)
    slow_weight, slow_momentum = weight.numpy().copy(), momentum.numpy().copy()
    slow_moment = np.zeros((2, max(rows, columns)))
    for step, (mu, lr) in enumerate([(0.85, 0.023), (0.88, 0.03), (0.95, 0.2), (0.9, 0.02)]):
        g = normal(2, rows, columns, seed=step)
        normuon_update(
            weight,
            g.clone(),
            momentum,
            moment,
            None,
            torch.tensor(mu, dtype=torch.float64),
            torch.full((2, 1, 1), mult * lr, dtype=torch.float64),
            torch.tensor(1.2 * lr, dtype=torch.float64),
            0.95,
            COEFFICIENTS,
            1.02,
        )
        for n in range(2):
            slow_step(slow_weight[n], g[n].numpy(), slow_momentum[n], slow_moment[n], mu=mu, lr=lr, mult=mult)
        torch.testing.assert_close(weight, torch.from_numpy(slow_weight), rtol=1e-8, atol=1e-9)


# --- the mantissa ---


def as_bits(x: torch.Tensor) -> list[int]:
    return [value & 0xFFFFFFFF for value in x.view(torch.int32).tolist()]


def test_the_upper_half_is_truncated_and_the_lower_half_kept():
    bits = [0x3F800000, 0x3F80FFFF, 0x3F808000, 0x3F807FFF, 0xBF80FFFF, 0x00008001, 0xC2F7ABCD]
    weight = torch.tensor(np.array(bits, dtype=np.uint32).view(np.float32))
    upper, lower = split_mantissa(weight)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert [value & 0xFFFF for value in upper.view(torch.int16).tolist()] == [b >> 16 for b in bits]
    assert [value & 0xFFFF for value in lower.tolist()] == [b & 0xFFFF for b in bits]
    assert as_bits(join_mantissa(upper, lower)) == bits


def bf16_step(weight, gradient, state, *, lr, mu=0.9):
    normuon_update(
        weight,
        gradient,
        state["momentum"],
        state["second_moment"],
        state["mantissa"],
        torch.tensor(mu),
        torch.full((1, 1, 1), 2 * lr),
        torch.tensor(1.2 * lr),
        0.95,
        COEFFICIENTS,
        1.02,
    )


def test_decay_smaller_than_a_bf16_step_is_not_lost():
    """Without gradients only the decay acts, 6e-4 to 1e-3 of a weight a step, a fraction of bf16's last place."""
    weight = normal(1, 6, 6).bfloat16()
    master = weight.double()
    state = {
        "momentum": torch.zeros(1, 6, 6),
        "second_moment": torch.zeros(1, 6, 1),
        "mantissa": torch.zeros(1, 6, 6, dtype=torch.int16),
    }
    for step in range(40):
        lr = 0.02 + 0.0001 * step
        bf16_step(weight, torch.zeros(1, 6, 6, dtype=torch.bfloat16), state, lr=lr)
        master = master - master * (1.2 * lr) * (2 * lr)
        joined = join_mantissa(weight, state["mantissa"])
        torch.testing.assert_close(joined.double(), master, rtol=1e-5, atol=0)
        assert torch.equal(weight.float().view(torch.int32), joined.view(torch.int32) & -65536)


def test_bf16_steps_follow_fp64_up_to_the_rounding_of_the_orthogonalization():
    weight = (0.05 * normal(1, 48, 12, seed=5)).bfloat16()
    start = weight.double()
    slow_weight, slow_momentum, slow_moment = start[0].numpy().copy(), np.zeros((48, 12)), np.zeros(48)
    state = {
        "momentum": torch.zeros(1, 48, 12),
        "second_moment": torch.zeros(1, 48, 1),
        "mantissa": torch.zeros(1, 48, 12, dtype=torch.int16),
    }
    for step in range(4):
        g = normal(1, 48, 12, seed=step).bfloat16()
        bf16_step(weight, g.clone(), state, lr=0.003)
        slow_step(slow_weight, g[0].double().numpy(), slow_momentum, slow_moment, mu=0.9, lr=0.003, mult=2.0)
    moved = join_mantissa(weight, state["mantissa"])[0].double() - start[0]
    expected = torch.from_numpy(slow_weight) - start[0]
    assert (moved - expected).norm() < 0.03 * expected.norm()
    assert state["momentum"].dtype == torch.float32
    torch.testing.assert_close(state["momentum"][0].double(), torch.from_numpy(slow_momentum), rtol=1e-5, atol=1e-6)
