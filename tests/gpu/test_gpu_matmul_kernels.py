"""The Triton kernels of the MLP, the symmetric products and the transposes, on the GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from nanogpt.kernels.relu_squared_mlp import relu_squared_mlp, relu_squared_mlp_plain
from nanogpt.kernels.symmetric_matmul import ba_plus_caa, ba_plus_caa_plain, x_xt, x_xt_plain
from nanogpt.kernels.transpose import transpose_add, transpose_copy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, device="cuda")).bfloat16()


def kernels_of(function) -> set[str]:
    """Names of the GPU kernels that `function` launches."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return {event.key for event in profile.key_averages()}


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs sm_90"
)


@pytest.mark.parametrize(
    ("tokens", "width", "hidden"),
    [(16_384, 768, 3_072), (49_152, 768, 3_072), (4_112, 768, 3_072), (16, 768, 3_072), (208, 72, 200)],
)
def test_mlp_and_its_gradients(tokens, width, hidden):
    torch.manual_seed(tokens)
    inputs = [randn(tokens, width), randn(hidden, width, scale=0.03), randn(hidden, width, scale=0.03)]
    grad = randn(tokens, width)
    exact = [x.double().requires_grad_() for x in inputs]
    reference = relu_squared_mlp_plain(*exact)
    references = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    inputs = [x.requires_grad_() for x in inputs]
    for name, function in (("fast", relu_squared_mlp), ("plain", relu_squared_mlp_plain)):
        out = function(*inputs)
        errors = [
            relative_error(x, y)
            for x, y in zip((out, *torch.autograd.grad(out, inputs, grad)), references, strict=True)
        ]
        shown = ", ".join(f"{e:.1e}" for e in errors)
        print(f"relative error MLP {tokens} x {width} x {hidden}, {name}: out, du, dup, ddown = {shown}")
        assert all(e < 6e-3 for e in errors), name


@needs_hopper
def test_mlp_takes_the_kernel_and_keeps_one_activation():
    inputs = [x.requires_grad_() for x in (randn(4_096, 768), randn(3_072, 768), randn(3_072, 768))]
    assert any("_kernel" in name for name in kernels_of(lambda: relu_squared_mlp(*inputs)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        relu_squared_mlp(*inputs)
    assert sum(shape == (4_096, 3_072) for shape in saved) == 1


def test_mlp_compiles_whole():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def block(x, up, down):
        return (x + relu_squared_mlp(torch.nn.functional.rms_norm(x, (768,)), up, down)).float().square().mean()

    inputs = [randn(2_048, 768), randn(3_072, 768, scale=0.03), randn(3_072, 768, scale=0.03)]
    inputs = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for _ in range(2):
        got = torch.autograd.grad(compiled(*inputs), inputs)
    expected = torch.autograd.grad(block(*inputs), inputs)
    for x, y in zip(got, expected, strict=True):
        assert relative_error(x, y) < 2e-2
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(40, 768, 768), (5, 768, 768), (24, 3_072, 768), (3, 80, 200), (1, 16, 16)])
def test_symmetric_products(shape):
    torch.manual_seed(shape[1])
    batch, rows, _ = shape
    x = randn(*shape, scale=rows**-0.5)
    for name, view in (("X X^T", x), ("X^T X", x.mT)):
        if view.shape[1] > 1_000:
            continue
        exact = view.double() @ view.double().mT
        out = torch.full((batch, view.shape[1], view.shape[1]), torch.nan, device="cuda", dtype=torch.bfloat16)
        returned = x_xt(view, out)
        assert returned is out
        torch.testing.assert_close(x_xt(view), out, rtol=0, atol=0)
        print(f"relative error {name} {shape}: {relative_error(out, exact):.1e}")
        assert relative_error(out, exact) < 1.05 * relative_error(x_xt_plain(view), exact)

        a = out.clone()
        exact = -2.77 * a.double() + 0.51 * (a.double() @ a.double())
        out.fill_(torch.nan)
        assert ba_plus_caa(a, -2.77, 0.51, out) is out
        print(f"relative error b A + c A A {shape}: {relative_error(out, exact):.1e}")
        assert relative_error(out, exact) < 1.05 * relative_error(ba_plus_caa_plain(a, -2.77, 0.51), exact)
        exact += 3.8 * torch.eye(a.shape[1], device="cuda", dtype=torch.float64)
        assert relative_error(ba_plus_caa(a, -2.77, 0.51, diagonal=3.8), exact) < 2.5e-3


def test_symmetric_products_compile_whole():
    torch._dynamo.reset()
    coefficients = [(4.04, -2.81, 0.5), (3.89, -2.77, 0.51), (2.35, -1.71, 0.42)]

    def orthogonalize(x):
        x = x / (1.02 * x.float().norm(dim=(1, 2), keepdim=True)).bfloat16()
        for a, b, c in coefficients:
            x = torch.baddbmm(x, ba_plus_caa(x_xt(x), b, c), x, beta=a)
        return x

    x = randn(4, 768, 768)
    got = torch.compile(orthogonalize, fullgraph=True)(x)
    assert relative_error(got, orthogonalize(x)) < 1e-2

    def into(x, a, out):
        x_xt(x, a)
        ba_plus_caa(a, -2.77, 0.51, out)
        return out.sum()

    a, out = (torch.full_like(x, torch.nan) for _ in range(2))
    torch.compile(into, fullgraph=True)(x, a, out)
    torch.testing.assert_close(a, x_xt(x), rtol=0, atol=0)
    torch.testing.assert_close(out, ba_plus_caa(a, -2.77, 0.51), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(768, 50_304), (50_304, 768), (7, 130), (48, 1_000)])
def test_transposes(shape):
    src, dst = randn(*shape), randn(*shape[::-1])
    expected = (dst.float() + src.float().mT).bfloat16()
    transpose_add(src, dst)
    assert torch.equal(dst, expected)
    transpose_copy(src, dst)
    assert torch.equal(dst, src.mT)


def test_transposes_compile_whole():
    def tie(src, dst):
        transpose_add(src, dst)
        doubled = dst * 2
        transpose_copy(src, dst)
        return doubled

    src, dst = randn(768, 1_024), randn(1_024, 768)
    expected = (dst.float() + src.float().mT).bfloat16() * 2
    doubled = torch.compile(tie, fullgraph=True)(src, dst)
    torch.testing.assert_close(doubled, expected)
    assert torch.equal(dst, src.mT)
