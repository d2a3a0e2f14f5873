"""RMSNorm: its value where eps counts, and its precision."""

from __future__ import annotations

import pytest
import torch

from nanogpt.layers.norm import norm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("size", [3e-4, 5e-3, 1.0, 1e3])
def test_divides_by_the_root_mean_square_with_fp32_eps(dtype, rel, size):
    """3e-4 squared is below 2^-23; 5e-3 is where the speedrun starts, and bf16's eps of 2^-7 would swamp it."""
    x = (size * torch.randn(5, 96, generator=torch.Generator().manual_seed(0))).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    for row, got in zip(x.tolist(), y.tolist(), strict=True):
        root = (sum(value * value for value in row) / 96 + 1 / 8388608) ** 0.5
        assert got == pytest.approx([value / root for value in row], rel=rel)


def test_bf16_is_the_fp32_result_rounded_once():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_works_over_the_last_dimension_of_any_shape():
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x), torch.stack([norm(part) for part in x.unbind(1)], dim=1))
    assert not norm(torch.zeros(2, 8)).any()
