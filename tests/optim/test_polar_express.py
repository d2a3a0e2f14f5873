"""Polar Express against what it does to singular values."""

from __future__ import annotations

import pytest
import torch

from nanogpt.optim.polar_express import polar_express
from nanogpt.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

COEFFICIENTS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """X <- aX + (bA + cAA)X with A = X X^T turns every singular value s into a s + b s^3 + c s^5."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (1.02 * matrix.double().square().sum().sqrt() + 1e-6)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


def matrices(rows: int, columns: int, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    return size * torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)


def test_the_recipe_has_the_coefficients():
    normuon = load_recipe("speedrun").optimizer.normuon
    assert normuon.polar_express == COEFFICIENTS
    assert normuon.norm_margin == 1.02


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (40, 10), (10, 40)])
@pytest.mark.parametrize("size", [1.0, 1e3, 3e-7])
def test_equals_the_map_of_singular_values(rows, columns, size):
    """3e-7: the floor of the norm counts."""
    g = matrices(rows, columns, size)
    x = polar_express(g, COEFFICIENTS, 1.02)
    for got, matrix in zip(x, g, strict=True):
        torch.testing.assert_close(got, by_singular_values(matrix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 16)])
def test_narrow_dtypes_come_near(dtype, rows, columns):
    g = matrices(rows, columns).to(dtype)
    x = polar_express(g, COEFFICIENTS, 1.02)
    assert x.dtype == dtype
    for got, matrix in zip(x, g, strict=True):
        expected = by_singular_values(matrix)
        error = (got.double() - expected).norm() / expected.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 1e-4)


def test_the_result_is_about_orthogonal_and_zero_stays_zero():
    g = matrices(40, 10)
    g[1] = 0
    x = polar_express(g, COEFFICIENTS, 1.02)
    singular = torch.linalg.svdvals(x[0])
    assert 0.7 < singular.min() <= singular.max() < 1.25
    assert not x[1].any()
