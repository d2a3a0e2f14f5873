"""The plain equivalents of the matrix kernels, and what the dispatch promises on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nanogpt.gpus import meets
from nanogpt.kernels import relu_squared_mlp as mlp_module
from nanogpt.kernels import symmetric_matmul
from nanogpt.kernels.dispatch import ANY, runs_kernel
from nanogpt.kernels.relu_squared_mlp import (
    _relu_squared_backward,
    _relu_squared_up,
    relu_squared_mlp,
    relu_squared_mlp_plain,
)
from nanogpt.kernels.symmetric_matmul import ba_plus_caa, x_xt
from nanogpt.kernels.transpose import transpose_add, transpose_copy


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def test_mlp_is_its_formula_one_unit_at_a_time():
    u, up, down = randn(5, 3), randn(7, 3), randn(7, 3) + 1
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for unit in range(7):
        activation = (u * up[unit]).sum(dim=1).clamp(min=0) ** 2
        expected += activation[:, None] * down[unit]
    torch.testing.assert_close(relu_squared_mlp(u, up, down), expected)


def test_mlp_gradients():
    inputs = [randn(6, 4).requires_grad_(), randn(8, 4).requires_grad_(), (randn(8, 4) + 1).requires_grad_()]
    assert torch.autograd.gradcheck(relu_squared_mlp, inputs)


def test_the_fused_backward_formula():
    """What the kernels compute from the square alone is the gradient of the plain version."""
    inputs = [randn(6, 4).requires_grad_(), randn(8, 4).requires_grad_(), (randn(8, 4) + 1).requires_grad_()]
    grad = randn(6, 4) - 2
    expected = torch.autograd.grad(relu_squared_mlp_plain(*inputs), inputs, grad)
    u, up, down = (x.detach() for x in inputs)
    post = torch.relu(u @ up.mT) ** 2
    grad_pre = 2 * post.sqrt() * (grad @ down.mT)
    got = grad_pre @ up, grad_pre.mT @ u, post.mT @ grad
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_mlp_operations_have_fakes():
    with FakeTensorMode():
        u, up = (torch.empty(n, 768, device="cuda", dtype=torch.bfloat16) for n in (64, 3_072))
        post = _relu_squared_up(u, up)
        assert (post.shape, post.dtype) == ((64, 3_072), torch.bfloat16)
        assert _relu_squared_backward(u, up, post).shape == (64, 3_072)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_symmetric_products(dtype):
    x = randn(3, 8, 5).to(dtype)
    exact = torch.einsum("bik,bjk->bij", x.double(), x.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(x_xt(x).double(), exact, rtol=tolerance, atol=tolerance)
    wide = torch.einsum("bki,bkj->bij", x.double(), x.double())
    torch.testing.assert_close(x_xt(x.mT).double(), wide, rtol=tolerance, atol=tolerance)

    out = torch.full_like(exact, torch.nan, dtype=dtype)
    assert x_xt(x, out) is out
    torch.testing.assert_close(out, x_xt(x), rtol=0, atol=0)

    a = out.clone()
    exact = -2.8 * a.double() + 0.5 * torch.einsum("bik,bkj->bij", a.double(), a.double())
    assert ba_plus_caa(a, -2.8, 0.5, out) is out
    scale = exact.abs().max().item()
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(ba_plus_caa(a, -2.8, 0.5), out, rtol=0, atol=0)
    shifted = ba_plus_caa(a, -2.8, 0.5, diagonal=3.0)
    identity = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(shifted.double(), exact + 3 * identity, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposes(dtype):
    src, dst = randn(5, 9, dtype=dtype), randn(9, 5, dtype=dtype)
    before = dst.clone()
    transpose_add(src, dst)
    assert torch.equal(dst, before + src.T)
    transpose_copy(src, dst)
    assert torch.equal(dst, src.T)


def test_a_cpu_never_takes_a_kernel():
    x = randn(16, 16, dtype=torch.bfloat16)
    assert not runs_kernel(x)


@pytest.mark.parametrize(
    ("device_capability", "dtype", "needs", "expected"),
    [
        ((9, 0), torch.bfloat16, mlp_module.NEEDS, True),
        ((10, 0), torch.bfloat16, mlp_module.NEEDS, True),
        ((12, 0), torch.bfloat16, mlp_module.NEEDS, False),
        ((8, 9), torch.bfloat16, mlp_module.NEEDS, False),
        ((12, 0), torch.bfloat16, symmetric_matmul.NEEDS, True),
        ((8, 0), torch.bfloat16, symmetric_matmul.NEEDS, False),
        ((8, 0), torch.bfloat16, ANY, True),
        ((7, 5), torch.bfloat16, ANY, False),
        ((9, 0), torch.float32, ANY, False),
    ],
)
def test_kernels_are_chosen_by_capability_and_dtype(monkeypatch, device_capability, dtype, needs, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: device_capability)
    with FakeTensorMode():
        x = torch.empty(16, 16, device="cuda", dtype=dtype)
        assert runs_kernel(x, x, needs=needs) is expected
        assert not runs_kernel(x, torch.empty(16, dtype=torch.float32, device="cuda"), needs=needs)


def test_the_choice_is_a_constant_of_compiled_code():
    """Neither a graph break nor a guard that costs: the dispatch is traced with the model."""

    def double_where_it_fits(x):
        return 2 * x if meets(mlp_module.NEEDS, (9, 0)) and not meets(mlp_module.NEEDS, (12, 0)) else x

    compiled = torch.compile(double_where_it_fits, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
