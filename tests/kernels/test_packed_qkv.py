"""Norm, rotary and key shift of packed queries and keys, and back to 8 bits: plain PyTorch, and the kernels by Triton's
interpreter.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from small_specs import relative_error
from torch import Tensor
from triton_interpreter import needs_triton, run_interpreted

from nanogpt.kernels.fp8_mlp import to_e4m3
from nanogpt.kernels.packed_qkv import (
    Rotation,
    norm_and_rotate,
    packed_gradient,
    packed_gradient_plain,
    transposed_8bit,
)
from nanogpt.layers.attention import rotated_queries_keys
from nanogpt.layers.norm import EPS
from nanogpt.layers.rotary import Rotary
from nanogpt.layers.specs import RotarySpec

ROTATED = 8


class Heads(NamedTuple):
    """A layer's."""

    number: int
    dim: int  # of queries and keys
    value_dim: int
    paired: bool
    shifted: bool


CASES = {
    "all channels turn": Heads(3, ROTATED, 8, paired=False, shifted=False),
    "paired": Heads(6, ROTATED, 16, paired=True, shifted=False),
    "half values": Heads(2, ROTATED, 4, paired=False, shifted=False),
    "shifted": Heads(3, 16, 16, paired=False, shifted=True),
    "paired, not all channels turn": Heads(4, 16, 16, paired=True, shifted=False),
    "shifted, few channels still": Heads(1, 12, 8, paired=False, shifted=True),
}


def make_rotary(tokens: int, dtype: torch.dtype) -> Rotary:
    spec = RotarySpec(frequencies=ROTATED // 2, base=1024, yarn_low=1, yarn_high=32, yarn_temperature=0.2)
    return Rotary(spec, max_tokens=tokens + 3, attention_scale=0.1, dtype=dtype)


def make_inputs(heads: Heads, tokens: int) -> list[Tensor]:
    """Packed queries and keys (T, 2 H D), and the gradients of q, k (T, H, D) and v (T, H, E); fp32."""
    generator = torch.Generator().manual_seed(tokens)
    widths = 2 * heads.dim, heads.dim, heads.dim, heads.value_dim
    qk, *grads = (torch.randn(tokens, heads.number, width, generator=generator) for width in widths)
    return [qk.flatten(1), *grads]


def make_rotation(heads: Heads, rotary: Rotary) -> Rotation:
    return Rotation(rotary.cos, rotary.signed_sin, heads.paired, heads.shifted, EPS)


def expected(heads: Heads, rotary: Rotary, qk: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and the packed gradient, in fp64, by the layers' functions and autograd."""
    leaf = qk.double().requires_grad_()
    q, k = leaf.view(len(qk), 2, heads.number, heads.dim).unbind(1)
    q, k = rotated_queries_keys(q, k, rotary, paired=heads.paired, shifted=heads.shifted)
    [grad] = torch.autograd.grad((q, k), leaf, (dq.double(), dk.double()))
    return q.detach(), k.detach(), torch.cat((grad, dv.double().flatten(1)), dim=1)


@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("name", CASES)
def test_plain_queries_keys_and_gradients_are_the_layers(name, tokens):
    heads, rotary = CASES[name], make_rotary(tokens, torch.float64)
    inputs = make_inputs(heads, tokens)
    q, k, grad = expected(heads, rotary, *inputs)
    qk, dq, dk, dv = (x.double() for x in inputs)
    rotation = make_rotation(heads, rotary)
    out = norm_and_rotate(qk, rotation, heads=heads.number)
    assert out.is_contiguous() and out.dtype == torch.float64
    assert relative_error(out, torch.stack((q, k))) < 1e-14
    found = packed_gradient_plain(dq, dk, dv, qk, rotation)
    assert relative_error(found, grad) < 1e-13

    grad8 = packed_gradient(dq, dk, dv, qk, rotation, factor=448.0)
    assert torch.equal(grad8.float(), to_e4m3(448 * found).float())
    transposed = transposed_8bit(grad8)
    assert torch.equal(transposed.float(), grad8.float().mT) and transposed.is_contiguous()


def test_large_gradients_become_the_largest_number():
    heads = CASES["shifted"]
    qk, dq, dk, dv = make_inputs(heads, 4)
    dv[2, 1, 3], dv[3, 0, 0] = -1e6, 1e30
    grad8 = packed_gradient(dq, dk, dv, qk, make_rotation(heads, make_rotary(4, torch.float32)), factor=448.0)
    values = grad8.float()[:, 2 * heads.number * heads.dim :].view_as(dv)
    assert values[2, 1, 3] == -448 and values[3, 0, 0] == 448


def test_bf16_is_rounded_at_the_end_only():
    heads, rotary = CASES["shifted"], make_rotary(13, torch.bfloat16)
    qk = make_inputs(heads, 13)[0].bfloat16()
    out = norm_and_rotate(qk, make_rotation(heads, rotary), heads=heads.number)
    wide = norm_and_rotate(qk.double(), make_rotation(heads, rotary.double()), heads=heads.number)
    assert out.dtype == torch.bfloat16
    assert (out == wide.bfloat16()).float().mean() > 0.99  # fp32 may lie on the other side of the middle


def test_operations_tell_a_compiler_their_shapes():
    """What a graph is traced with: the kernels' results are those of the plain equivalents in shape and dtype."""
    heads, tokens = CASES["paired"], 6
    rotation = make_rotation(heads, make_rotary(tokens, torch.bfloat16))
    qk, dq, dk, dv = (x.bfloat16() for x in make_inputs(heads, tokens))
    found = packed_gradient(dq, dk, dv, qk, rotation, factor=1.0)
    wanted = norm_and_rotate(qk, rotation, heads=heads.number), found, transposed_8bit(found)
    qk, dq, dk, dv = (x.to("meta") for x in (qk, dq, dk, dv))
    rotation = rotation._replace(cos=rotation.cos.to("meta"), sin=rotation.sin.to("meta"))
    operations = torch.ops.nanogpt
    traced = (
        operations.norm_and_rotate(qk, *rotation, heads.number),
        operations.packed_qkv_gradient(dq, dk, dv, qk, *rotation, 1.0),
        operations.transposed_8bit(found.to("meta")),
    )
    for one, other in zip(traced, wanted, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def interpreted() -> None:
    """In a process of its own: the kernels on a CPU, in fp32 throughout: the interpreter does not round to 8 bits."""
    from nanogpt.kernels.packed_qkv_triton import Config, backward, forward

    config = Config(block=4, warps=4)
    for name, heads in CASES.items():
        for tokens in (1, 4, 13):
            rotary, inputs = make_rotary(tokens, torch.float32), make_inputs(heads, tokens)
            qk, dq, dk, dv = inputs
            rotation = make_rotation(heads, rotary)
            q, k, grad = expected(heads, rotary.double(), *inputs)
            out = forward(qk, rotation, heads.number, config)
            assert relative_error(out, torch.stack((q, k))) < 1e-6, name
            found = backward(dq, dk, dv, qk, rotation, 3.0, torch.float32, config)
            assert relative_error(found, 3 * grad) < 1e-6, name


@needs_triton
def test_the_kernels_in_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
