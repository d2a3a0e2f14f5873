"""The 8-bit product that makes queries, keys and values: its roundings one by one, and what they cost."""

from __future__ import annotations

import pytest
import torch
from small_specs import relative_error

from nanogpt.layers.fp8_projection import fp8_projection

T, D, R = 32, 48, 64


def make_inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """u (T, D) as a norm leaves it, a weight (R, D), the layer's scalar, and a gradient (T, R) below 1."""
    generator = torch.Generator().manual_seed(seed)
    u, weight = torch.randn(T, D, generator=generator), 0.03 * torch.randn(R, D, generator=generator)
    return u, weight, torch.tensor(0.7), 0.1 * torch.randn(T, R, generator=generator)


def e4m3(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Rounded to e4m3 in units of `scale`, in fp64."""
    return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale


def gradients(
    u: torch.Tensor, weight: torch.Tensor, scale_in: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (u, weight, scale_in)]
    out = fp8_projection(*leaves)
    out.backward(grad)
    return out.detach(), *(leaf.grad for leaf in leaves)


def test_each_product_is_of_the_rounded_operands() -> None:
    u, weight, scale_in, grad = make_inputs()
    out, du, dw, dscale = gradients(u, weight, scale_in, grad)
    x8, w8, g8 = e4m3(u, 8 / 448), e4m3(weight, float(weight.abs().max()) / 448), e4m3(grad, 1 / 448)
    assert relative_error(out, 0.7 * x8 @ w8.T) < 1e-6
    assert relative_error(du, 0.7 * g8 @ w8) < 1e-6
    assert relative_error(dw, 0.7 * g8.T @ x8) < 1e-6
    assert relative_error(dscale, ((g8.T @ x8) * weight).sum()) < 1e-5


def test_it_is_close_to_the_exact_product() -> None:
    u, weight, scale_in, grad = make_inputs(1)
    found = gradients(u, weight, scale_in, grad)
    exact = [x.double().requires_grad_() for x in (u, weight, scale_in)]
    out = exact[2] * exact[0] @ exact[1].T
    out.backward(grad.double())
    for one, other in zip(found[:3], (out, exact[0].grad, exact[1].grad), strict=True):
        assert 0.005 < relative_error(one, other) < 0.05


def test_what_is_too_large_saturates() -> None:
    u, weight, scale_in, grad = make_inputs(2)
    large = u.clone()
    large[3, 5] = 100.0
    bounded = u.clone()
    bounded[3, 5] = 8.0
    assert torch.equal(gradients(large, weight, scale_in, grad)[0], gradients(bounded, weight, scale_in, grad)[0])
    large, bounded = grad.clone(), grad.clone()
    large[2, 7], bounded[2, 7] = -50.0, -1.0
    for one, other in zip(gradients(u, weight, scale_in, large), gradients(u, weight, scale_in, bounded), strict=True):
        assert torch.equal(one, other)


def test_a_weight_of_zeros_gives_zeros() -> None:
    u, weight, scale_in, grad = make_inputs(3)
    out, du, dw, _ = gradients(u, torch.zeros_like(weight), scale_in, grad)
    assert not out.any() and not du.any() and dw.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_keeps_dtypes(dtype: torch.dtype) -> None:
    u, weight, scale_in, grad = make_inputs(4)
    found = gradients(u.to(dtype), weight.to(dtype), scale_in, grad.to(dtype))
    assert [x.dtype for x in found] == [dtype, dtype, dtype, torch.float32]
