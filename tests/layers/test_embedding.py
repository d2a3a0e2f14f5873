"""Smear and gates, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from nanogpt.layers.embedding import bigram_sign, head_gate, smear, value_gate

pytestmark = pytest.mark.usefixtures("one_thread")


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_smear_adds_the_unsmeared_token_before():
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    y = smear(e, weight, torch.tensor(0.7, dtype=torch.float64))
    assert torch.equal(y[0], e[0])
    for t in range(1, 6):
        gate = 0.7 * sigma(sum(a * b for a, b in zip(weight[0].tolist(), e[t, :12].tolist(), strict=True)))
        torch.testing.assert_close(y[t], e[t] + gate * e[t - 1])


def test_head_gate_reads_the_leading_channels():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    gate = head_gate(u, weight)
    assert gate.shape == (4, 6, 1)
    for t in range(4):
        for h in range(6):
            score = sum(a * b for a, b in zip(u[t, :12].tolist(), weight[h].tolist(), strict=True))
            assert gate[t, h, 0].item() == pytest.approx(sigma(score))


def test_signs_go_by_the_two_tokens():
    signs = torch.randint(0, 2, (8192, 3), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    tokens = torch.tensor([50256, 0, 1, 50256, 50255], dtype=torch.int32)
    rows = [0, 50256 % 8192, 1, 50257 % 8192, (50255 ^ 50256) % 8192]
    assert torch.equal(bigram_sign(tokens, signs), signs[rows])


def test_a_value_gate_reads_six_channels_of_each():
    generator = torch.Generator().manual_seed(0)
    u, ve = (torch.randn(3, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    gate = value_gate(u, ve, weight)
    assert gate.shape == (3, 2, 1)
    for t, head in ((0, 0), (2, 1)):
        read = [*u[t, :6].tolist(), *ve[t, :6].tolist()]
        assert gate[t, head, 0].item() == pytest.approx(
            sigma(sum(a * b for a, b in zip(weight[head].tolist(), read, strict=True)))
        )
