"""Norm, rotary and key shift of packed queries and keys, and back to 8 bits, on the GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from small_specs import relative_error

from nanogpt.kernels.fp8_mlp import to_e4m3
from nanogpt.kernels.packed_qkv import (
    Rotation,
    norm_and_rotate,
    packed_gradient,
    packed_gradient_plain,
    transposed_8bit,
)
from nanogpt.layers.fp8_qkv import Fp8Qkv
from nanogpt.layers.norm import EPS
from nanogpt.layers.rotary import Rotary
from nanogpt.layers.specs import RotarySpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs 8-bit floats"
    ),
]

HEADS = 6
ROTARY = RotarySpec(frequencies=32, base=1024, yarn_low=1, yarn_high=32, yarn_temperature=0.2)


def make_case(
    tokens: int, channels: int, values: int, *, paired: bool, shifted: bool
) -> tuple[list[torch.Tensor], Rotation]:
    """qk and the gradients of q, k and v, with the tables of their positions."""
    torch.manual_seed(tokens)
    rotary = Rotary(ROTARY, max_tokens=tokens, attention_scale=0.1, dtype=torch.bfloat16).cuda()
    widths = 2 * channels, channels, channels, values
    qk, *grads = (torch.randn(tokens, HEADS, width, device="cuda") for width in widths)
    inputs = [qk.flatten(1).bfloat16(), *((0.1 * x).bfloat16() for x in grads)]
    return inputs, Rotation(rotary.cos, rotary.signed_sin, paired, shifted, EPS)


@pytest.mark.parametrize("tokens", [49_152, 16_384, 4_112])
@pytest.mark.parametrize(
    ("channels", "values", "paired"), [(64, 128, True), (64, 64, False), (128, 128, False), (128, 64, True)]
)
def test_both_ways_against_fp64(channels, values, paired, tokens):
    """The kernels round once: as close to fp64 as its rounding is, and nearly all of the same bits."""
    shifted = channels == 128 and not paired
    (qk, dq, dk, dv), rotation = make_case(tokens, channels, values, paired=paired, shifted=shifted)
    dv[1, 2, 3], dv[-1, 0, 5] = -3.0, 1.5  # beyond what the format holds at this scale
    wide = rotation._replace(cos=rotation.cos.double(), sin=rotation.sin.double())
    exact = norm_and_rotate(qk.double(), wide, heads=HEADS)
    out = norm_and_rotate(qk, rotation, heads=HEADS)
    error, rounding = relative_error(out, exact), relative_error(exact.bfloat16(), exact)
    print(f"{tokens} x {HEADS} x ({channels}, {values}): queries and keys {error:.2e}, bf16's own {rounding:.2e}")
    assert error < 1.01 * rounding

    exact = 448 * packed_gradient_plain(dq.double(), dk.double(), dv.double(), qk.double(), wide)
    grad8 = packed_gradient(dq, dk, dv, qk, rotation, factor=448.0)
    rounded = to_e4m3(exact)
    error, rounding = (relative_error(x.float(), exact.clamp(-448, 448)) for x in (grad8, rounded))
    differ = float((grad8.float() != rounded.float()).float().mean())
    print(f"  gradient {error:.3e}, e4m3's own {rounding:.3e}; other bits in {differ:.1e}")
    assert error < 1.001 * rounding and differ < 1e-4


def test_what_is_not_a_number_stays_so():
    (qk, dq, dk, dv), rotation = make_case(64, 64, 128, paired=False, shifted=False)
    dv[5, 1, 7] = torch.nan
    grad8 = packed_gradient(dq, dk, dv, qk, rotation, factor=448.0)
    for x in (grad8, transposed_8bit(grad8)):
        assert x.float().isnan().sum() == 1


@pytest.mark.parametrize("columns", [768, 1_152, 2_304])
def test_8_bit_transpose_has_its_tokens_in_pairs(columns):
    x = torch.randn(4_112, columns, device="cuda").to(torch.float8_e4m3fn)
    order = torch.arange(16, device="cuda").view(2, 8).T.flatten()  # 0, 8, 1, 9, ..., 7, 15
    ordered = x.view(torch.uint8).view(-1, 16, columns)[:, order].flatten(0, 1)
    assert torch.equal(transposed_8bit(x).view(torch.uint8), ordered.mT)


def test_they_compile_whole_and_are_captured():
    """In a graph without breaks, replayed on other numbers."""
    torch._dynamo.reset()
    inputs, rotation = make_case(1_024, 128, 128, paired=False, shifted=True)

    def both(qk, dq, dk, dv):
        q, k = norm_and_rotate(2 * qk, rotation, heads=HEADS)
        grad8 = packed_gradient(dq + 1, dk, dv, 2 * qk, rotation, factor=448.0)
        return q + k, grad8, transposed_8bit(grad8)

    compiled = torch.compile(both, fullgraph=True)
    for one, other in zip(compiled(*inputs), both(*inputs), strict=True):
        assert relative_error(one.float(), other.float()) < 5e-3

    graph, given = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
    with torch.cuda.graph(graph):
        captured = compiled(*given)
    for x in given:
        x.mul_(0.5)
    graph.replay()
    for one, other in zip(captured, compiled(*(0.5 * x for x in inputs)), strict=True):
        assert torch.equal(one.float(), other.float())


def make_layer(
    channels: int, values: int, *, plain: bool, tokens: int = 4_096, width: int = 768
) -> tuple[Fp8Qkv, Rotary, list[torch.Tensor], list[torch.Tensor]]:
    """A module of two slots, a rotary, (u, weight, scalar) and gradients of q, k and v."""
    torch.manual_seed(channels + values)
    rotary = Rotary(ROTARY, max_tokens=tokens, attention_scale=0.1, dtype=torch.bfloat16).cuda()
    rows = HEADS * (2 * channels + values)
    u, weight = torch.randn(tokens, width, device="cuda"), 0.03 * torch.randn(rows, width, device="cuda")
    sizes = channels, channels, values
    grads = [(0.05 * torch.randn(tokens, HEADS, size, device="cuda")).bfloat16() for size in sizes]
    inputs = [u.bfloat16(), weight.bfloat16(), torch.tensor(0.7, device="cuda")]
    module = Fp8Qkv([(2, rows)], width=width, active=True, plain=plain).cuda()
    module.round([torch.stack((torch.zeros_like(inputs[1]), inputs[1]))])
    return module, rotary, [x.requires_grad_() for x in inputs], grads


@pytest.mark.parametrize(
    ("channels", "values", "paired"), [(64, 128, True), (64, 64, False), (128, 128, False)], ids=str
)
def test_a_layer_fast_and_plain(channels, values, paired):
    """Values are equal; the rest differs by roundings that lie near the middle."""
    results = []
    for plain in (True, False):
        module, rotary, inputs, grads = make_layer(channels, values, plain=plain)
        options = {"heads": HEADS, "channels": channels, "paired": paired, "shifted": channels == 128}
        out = module(1, *inputs, rotary, **options)
        results.append([*(x.detach() for x in out), *torch.autograd.grad(out, inputs, grads)])
    errors = [relative_error(fast, plain) for plain, fast in zip(*results, strict=True)]
    print(f"({channels}, {values}): q, k, v, gradients of u, weight and scalar, to plain: {errors}")
    assert errors[2] == 0 and max(errors[:5]) < 3e-3 and errors[5] < 2e-2


def test_a_captured_layer_reads_weights_that_were_rounded_since():
    module, rotary, inputs, grads = make_layer(64, 128, plain=False)
    options = {"heads": HEADS, "channels": 64, "paired": True, "shifted": False}
    layer = torch.compile(lambda *own: module(1, *own, rotary, **options), fullgraph=True)

    def both_ways():
        out = layer(*inputs)
        return [*out, *torch.autograd.grad(out, inputs, grads)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        before = [x.detach().clone() for x in both_ways()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways()
    graph.replay()
    for one, other in zip(captured, before, strict=True):
        assert relative_error(one, other) < 1e-3
    weight = inputs[1].detach()
    module.round([torch.stack((weight, -weight))])
    graph.replay()
    for one, other in zip(captured[:3], before[:3], strict=True):
        assert torch.equal(one, -other), "queries, keys and values change their signs with the weights"
