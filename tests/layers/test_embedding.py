"""Smear, bigram hash and gates, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from nanogpt.layers.embedding import bigram_hash, bigram_sign, head_gate, smear, value_gate

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


def test_bigram_rows():
    tokens = torch.tensor([50256, 0, 1, 50256, 50255], dtype=torch.int32)
    rows = bigram_hash(tokens, 251520, (36313, 27191))
    assert rows.dtype == torch.int64
    # 27191 * 50256 = 1,366,510,896; 36313 * 50256 = 1,824,946,128; 36313 * 50255 = 1,824,909,815
    assert rows.tolist() == [
        251519,
        1_366_510_896 % 251_519,
        36_313 % 251_519,
        (1_824_946_128 ^ 27_191) % 251_519,
        (1_824_909_815 ^ 1_366_510_896) % 251_519,
    ]


def test_the_last_bigram_row_belongs_to_the_first_token_alone():
    tokens = torch.randint(0, 50257, (20_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows = bigram_hash(tokens, 98, (36313, 27191))
    assert rows[0] == 97
    assert sorted(rows[1:].unique().tolist()) == list(range(97))


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
