"""XSA by hand: what is taken away, and where a value is too short to say."""

from __future__ import annotations

import math

import pytest
import torch

from nanogpt.layers.attention import remove_own_value


def test_the_part_along_the_own_value_goes():
    y = torch.tensor([[[3.0, 4.0], [1.0, 2.0]]], dtype=torch.float64)
    v = torch.tensor([[[2.0, 0.0], [0.0, -5.0]]], dtype=torch.float64)
    strength = torch.tensor([[20.0, 0.5]], dtype=torch.float64)  # tanh(20) is 1
    out = remove_own_value(y, v, strength)
    assert out[0, 0].tolist() == pytest.approx([0.0, 4.0])
    assert out[0, 1].tolist() == pytest.approx([1.0, 2.0 * (1 - math.tanh(0.5))])
    assert torch.equal(remove_own_value(y, v, torch.zeros(1, 2)), y)


def test_a_value_of_nothing_and_one_below_the_floor():
    y, strength = torch.ones(1, 2, 2, dtype=torch.float64), torch.full((1, 2), 20.0, dtype=torch.float64)
    v = torch.tensor([[[0.0, 0.0], [1e-5, 0.0]]], dtype=torch.float64)
    out = remove_own_value(y, v, strength)
    assert out[0, 0].tolist() == [1.0, 1.0]
    assert out[0, 1].tolist() == pytest.approx([1 - 1e-5 * 1e-5 / 1e-8, 1.0])  # |v|^2 is 1e-10, and counts as 1e-8


def test_bf16_is_computed_in_fp32_and_rounded_once():
    generator = torch.Generator().manual_seed(0)
    y, v, strength = (torch.randn(s, generator=generator).bfloat16() for s in ((9, 3, 16), (9, 3, 16), (9, 3)))
    out = remove_own_value(y, v, strength)
    wide = remove_own_value(y.double(), v.double(), torch.tanh(strength).double().atanh())
    assert out.dtype == torch.bfloat16
    assert (out == wide.bfloat16()).float().mean() > 0.99
