"""Rotary tables, the rotation's sign, its paired form, YaRN and the key shift, pair by pair in plain Python."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch

from nanogpt.layers.rotary import Rotary, shift_still_keys
from nanogpt.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = load_recipe("speedrun").model.rotary
BLOCK = 128


def make_rotary(max_tokens: int = 8, dtype: torch.dtype = torch.float64) -> Rotary:
    return Rotary(SPEC, max_tokens=max_tokens, attention_scale=0.1, dtype=dtype)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rotated(head: list[float], position: int) -> list[float]:
    """Channels 2j and 2j + 1 are a complex number, rotated clockwise by position * (1/1024)^(j/31)."""
    out = list(head)
    for j in range(32):
        pair = complex(head[2 * j], head[2 * j + 1]) * cmath.exp(-1j * position * 1024 ** (-j / 31))
        out[2 * j], out[2 * j + 1] = pair.real, pair.imag
    return out


def test_each_pair_is_rotated_by_its_position_and_the_rest_is_not():
    x = values(8, 2, 128)
    y = make_rotary()(x)
    for t in range(8):
        for h in range(2):
            assert y[t, h].tolist() == pytest.approx(rotated(x[t, h].tolist(), t), abs=1e-5)
    assert torch.equal(y[..., 64:], x[..., 64:])


def test_paired_heads_take_turns_at_twice_the_positions():
    x = values(8, 6, 128)
    y = make_rotary()(x, paired=True)
    for t in range(8):
        for h in range(6):
            assert y[t, h].tolist() == pytest.approx(rotated(x[t, h].tolist(), 2 * t + h % 2), abs=1e-5)


def test_start_frequencies():
    frequency = make_rotary().frequency
    assert frequency.dtype == torch.float32
    assert frequency.tolist() == pytest.approx([1024 ** (-j / 31) for j in range(32)], rel=1e-6)
    assert (frequency[0].item(), frequency[-1].item()) == pytest.approx((1, 1 / 1024))


def test_angles_are_rounded_to_fp32():
    """At position 100,003 an fp32 angle is off by up to 4e-3: the tables must have this rounding and no other."""
    rotary = make_rotary(max_tokens=50_002)
    position = 100_003
    for j, frequency in enumerate(rotary.frequency.numpy()):
        angle = float(np.float32(position) * frequency)
        assert rotary.cos[position, 2 * j : 2 * j + 2].tolist() == pytest.approx([math.cos(angle)] * 2, abs=1e-6)
        sines = [math.sin(angle), -math.sin(angle)]
        assert rotary.signed_sin[position, 2 * j : 2 * j + 2].tolist() == pytest.approx(sines, abs=1e-6)


def test_bf16_tables_are_fp32_values_rounded():
    wide, narrow = make_rotary(dtype=torch.float32), make_rotary(dtype=torch.bfloat16)
    assert torch.equal(wide.cos.bfloat16(), narrow.cos)
    assert torch.equal(wide.signed_sin.bfloat16(), narrow.signed_sin)


def yarn_by_hand(frequency: float, old: int, new: int) -> float:
    turns = old * frequency / (2 * math.pi)
    if turns <= 1:
        return frequency * old / new
    if turns >= 32:
        return frequency
    kept = (turns - 1) / 31
    return frequency * (kept + (1 - kept) * old / new)


def test_yarn_over_the_whole_run():
    rotary = make_rotary()
    expected, scale = [1024 ** (-j / 31) for j in range(32)], 0.1
    for old, new, scale_after in ((3, 7, 0.116946), (7, 11, 0.127517), (11, 13, 0.131778)):
        kinds = {min(max((old * BLOCK * f / (2 * math.pi) - 1) / 31, 0), 1) for f in expected}
        assert {0, 1} < kinds, "all three cases of the rule must occur"
        rotary.extend_window(old * BLOCK, new * BLOCK)
        expected = [yarn_by_hand(f, old * BLOCK, new * BLOCK) for f in expected]
        scale *= 1 + 0.2 * math.log(new / old)
        assert rotary.frequency.tolist() == pytest.approx(expected, rel=2e-6)
        assert rotary.attention_scale == pytest.approx(scale, rel=1e-12)
        assert rotary.attention_scale == pytest.approx(scale_after, abs=1e-6)
        assert rotary.cos[5, ::2].tolist() == pytest.approx([math.cos(5 * f) for f in expected], abs=1e-5)
        assert rotary.signed_sin[5, 1::2].tolist() == pytest.approx([-math.sin(5 * f) for f in expected], abs=1e-5)
    assert round(rotary.attention_scale, 4) == 0.1318


def test_reset_and_extra_state():
    fresh, rotary, other = make_rotary(), make_rotary(), make_rotary()
    rotary.extend_window(384, 896)
    other.set_extra_state(rotary.get_extra_state())
    rotary.extend_window(896, 1408)
    other.extend_window(896, 1408)
    assert other.attention_scale == rotary.attention_scale
    assert torch.equal(other.cos, rotary.cos)
    assert torch.equal(other.signed_sin, rotary.signed_sin)
    rotary.reset()
    assert rotary.attention_scale == 0.1
    assert torch.equal(rotary.frequency, fresh.frequency)
    assert torch.equal(rotary.cos, fresh.cos)
    assert torch.equal(rotary.signed_sin, fresh.signed_sin)


def test_key_shift_moves_the_unrotated_half_one_token_on():
    k = values(5, 2, 16)
    shifted = shift_still_keys(k, 8)
    assert torch.equal(shifted[..., :8], k[..., :8])
    assert torch.equal(shifted[0], k[0])
    for t in range(1, 5):
        assert torch.equal(shifted[t, :, 8:], k[t - 1, :, 8:])
