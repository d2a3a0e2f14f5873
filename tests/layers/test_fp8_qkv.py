"""Queries, keys and values by an 8-bit product: its roundings, what they cost, and when weights are rounded."""

from __future__ import annotations

import pytest
import torch
from small_specs import relative_error

from nanogpt.layers.attention import rotated_queries_keys
from nanogpt.layers.fp8_qkv import Fp8Qkv
from nanogpt.layers.rotary import Rotary
from nanogpt.layers.specs import RotarySpec

pytestmark = pytest.mark.usefixtures("one_thread")

T, D = 32, 48
HEADS, CHANNELS, VALUES = 2, 12, 8
R = HEADS * (2 * CHANNELS + VALUES)
SPEC = RotarySpec(frequencies=4, base=1024, yarn_low=1, yarn_high=32, yarn_temperature=0.2)
ROTARY = Rotary(SPEC, max_tokens=T, attention_scale=0.1, dtype=torch.float32)
LAYOUT = {"heads": HEADS, "channels": CHANNELS, "paired": False, "shifted": True}


def make_inputs(seed: int = 0) -> list[torch.Tensor]:
    """u (T, D) as a norm leaves it, a weight (R, D), the layer's scalar, and gradients of q, k and v below 1."""
    generator = torch.Generator().manual_seed(seed)
    u, weight = torch.randn(T, D, generator=generator), 0.03 * torch.randn(R, D, generator=generator)
    grads = [0.01 * torch.randn(T, HEADS, width, generator=generator) for width in (CHANNELS, CHANNELS, VALUES)]
    return [u, weight, torch.tensor(0.7), *grads]


def fp8_qkv(u: torch.Tensor, weight: torch.Tensor, scale_in: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v from the second of two slots, after one of another shape; one more is behind."""
    module = Fp8Qkv([(1, 16), (3, R)], width=D, active=True, plain=False)
    module.round([torch.ones(1, 16, D), torch.stack((torch.zeros_like(weight), weight.detach(), 2 * weight.detach()))])
    return module(2, u, weight, scale_in, ROTARY, **LAYOUT)


def found(u: torch.Tensor, weight: torch.Tensor, scale_in: torch.Tensor, *grads: torch.Tensor) -> list[torch.Tensor]:
    """q, k, v and the gradients of u, the weight and the scalar."""
    leaves = [x.clone().requires_grad_() for x in (u, weight, scale_in)]
    out = fp8_qkv(*leaves)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, grads)]


def from_packed(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v from the product (T, R)."""
    qk, v = packed.split((2 * HEADS * CHANNELS, HEADS * VALUES), dim=1)
    q, k = qk.view(T, 2, HEADS, CHANNELS).unbind(1)
    return *rotated_queries_keys(q, k, ROTARY, paired=False, shifted=True), v.view(T, HEADS, VALUES)


def e4m3(values: torch.Tensor, scale: float) -> torch.Tensor:
    """Rounded to e4m3 in units of `scale`, in fp64."""
    return (values.double() / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale


def test_each_product_is_of_the_rounded_operands() -> None:
    u, weight, _, *grads = inputs = make_inputs()
    x8, w8 = e4m3(u, 8 / 448), e4m3(weight, float(weight.abs().max()) / 448)
    packed = (0.7 * x8 @ w8.T).requires_grad_()
    wanted = from_packed(packed)
    [grad] = torch.autograd.grad(wanted, packed, [x.double() for x in grads])
    g8 = e4m3(grad, 1 / 448)
    q, k, v, du, dw, dscale = found(*inputs)
    for one, other in zip((q, k, v), wanted, strict=True):
        assert relative_error(one, other) < 1e-6
    assert relative_error(du, 0.7 * g8 @ w8) < 1e-6
    assert relative_error(dw, 0.7 * g8.T @ x8) < 1e-6
    assert relative_error(dscale, ((g8.T @ x8) * weight).sum()) < 2e-4  # most of it cancels: norms undo the scalar


def test_it_is_close_to_the_exact_product() -> None:
    u, weight, scale_in, *grads = inputs = make_inputs(1)
    exact = [x.double().requires_grad_() for x in (u, weight, scale_in)]
    out = from_packed(exact[2] * exact[0] @ exact[1].T)
    gradients = torch.autograd.grad(out, exact, [x.double() for x in grads])
    names = "q", "k", "v", "u", "weight"
    for name, one, other in zip(names, found(*inputs), (*out, *gradients), strict=False):
        assert 0.005 < relative_error(one, other.detach()) < 0.08, name


def test_what_is_too_large_saturates() -> None:
    u, weight, scale_in, dq, dk, dv = make_inputs(2)
    large, bounded = u.clone(), u.clone()
    large[3, 5], bounded[3, 5] = 100.0, 8.0
    rest = weight, scale_in, dq, dk, dv
    for one, other in zip(found(large, *rest), found(bounded, *rest), strict=True):
        assert torch.equal(one, other)
    large, bounded = dv.clone(), dv.clone()
    large[2, 1, 7], bounded[2, 1, 7] = -50.0, -1.0
    rest = u, weight, scale_in, dq, dk
    for one, other in zip(found(*rest, large), found(*rest, bounded), strict=True):
        assert torch.equal(one, other)


def test_weights_count_as_they_were_rounded_last() -> None:
    """They are read in 8 bits; only the scalar's gradient reads what they are now."""
    u, weight, scale_in, *_ = make_inputs(3)
    module = Fp8Qkv([(1, R)], width=D, active=True, plain=False)
    run = lambda: module(0, u, weight, scale_in, ROTARY, **LAYOUT)  # noqa: E731
    module.round([weight[None]])
    before = run()
    weight.mul_(-1)
    assert all(torch.equal(one, other) for one, other in zip(run(), before, strict=True))
    module.round([weight[None]])
    assert all(torch.equal(one, -other) for one, other in zip(run(), before, strict=True))


def test_a_weight_of_zeros_gives_zeros() -> None:
    u, weight, *rest = make_inputs(4)
    q, k, v, du, dw, _ = found(u, torch.zeros_like(weight), *rest)
    assert not any(x.any() for x in (q, k, v, du)) and dw.isfinite().all() and dw.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_keeps_dtypes(dtype: torch.dtype) -> None:
    u, weight, scale_in, *grads = make_inputs(5)
    results = found(u.to(dtype), weight.to(dtype), scale_in, *(x.to(dtype) for x in grads))
    assert [x.dtype for x in results] == [dtype] * 5 + [torch.float32]


def test_it_compiles_whole() -> None:
    leaves = [x.requires_grad_() for x in make_inputs(6)[:3]]
    module = Fp8Qkv([(1, R)], width=D, active=True, plain=False)
    module.round([leaves[1].detach()[None]])

    def loss(u: torch.Tensor, weight: torch.Tensor, scale_in: torch.Tensor) -> torch.Tensor:
        q, k, v = module(0, u, weight, scale_in, ROTARY, **LAYOUT)
        return 0.1 * ((q * k).mean() + v.square().mean())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, gradients = loss(*leaves), torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(compiled(*leaves), expected)
    for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_inactive_it_holds_nothing() -> None:
    assert not Fp8Qkv([(1, R)], width=D, active=False, plain=False).state_dict()
    assert not list(Fp8Qkv([(1, R)], width=D, active=False, plain=False).buffers())
    assert not Fp8Qkv([(1, R)], width=D, active=True, plain=False).state_dict()
