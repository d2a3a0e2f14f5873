"""The DC correction on a CPU: forward and backward against the definition, roundings, reproducibility."""

from __future__ import annotations

import itertools

import pytest
import torch

from nanogpt.kernels import head_mixing
from nanogpt.kernels.head_mixing import mix_heads, normalized_weights

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, HEAD_DIM, SCALE = 4, 8, 0.37


def make_inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """y, q, k, v, w1, w2."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, HEADS, HEAD_DIM)] * 4 + [(tokens, HEADS)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def definition(y, q, k, v, w1, w2, ends, window, scale=SCALE):
    """Token by token, head by head."""
    document = [sum(end <= t for end in ends) for t in range(len(y))]
    rows = []
    for t in range(len(y)):
        seen = [s for s in range(max(0, t - window + 1), t + 1) if document[s] == document[t]]
        weights = [torch.softmax(scale * (k[seen, h] @ q[t, h]), 0) for h in range(HEADS)]
        mixture = sum(w1[t, h] * weights[h] for h in range(HEADS))
        rows.append(torch.stack([y[t, h] + w2[t, h] * (mixture @ v[seen, h]) for h in range(HEADS)]))
    return torch.stack(rows)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize(
    ("ends", "window"),
    [
        ([20], 4),  # several blocks
        ([1, 2, 9, 21], 5),  # documents that begin and end inside blocks, and a padded last block
        ([12, 13], 13),  # one block
        ([6, 11], 64),  # a window longer than the stream
        ([3, 17], 1),  # each token sees itself
    ],
)
def test_output_and_gradients_are_those_of_the_definition(ends, window, monkeypatch):
    monkeypatch.setattr(head_mixing, "_CHUNK_BLOCKS", 2)
    tokens = ends[-1]
    inputs = make_inputs(tokens)
    cu_seqlens = torch.tensor([0, *ends, tokens, tokens], dtype=torch.int32)
    out = mix_heads(*inputs, cu_seqlens, window=window, scale=SCALE)
    expected = definition(*inputs, ends, window)
    assert relative_error(out, expected) < 1e-13
    grad = torch.randn(out.shape, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(x, inputs, grad) for x in (out, expected))
    for name, a, b in zip(("y", "q", "k", "v", "w1", "w2"), found, wanted, strict=True):
        # With one token in sight the softmax is 1 whatever q and k are.
        assert (a - b).norm() <= 1e-12 * max(b.norm(), 1), name


def test_the_scale_may_be_a_tensor():
    inputs, ends = make_inputs(9), torch.tensor([0, 9], dtype=torch.int32)
    number = mix_heads(*inputs, ends, window=4, scale=SCALE)
    assert torch.equal(mix_heads(*inputs, ends, window=4, scale=torch.tensor(SCALE, dtype=torch.float64)), number)


def test_bf16_rounds_the_weights_and_the_sum_and_nothing_else():
    inputs = make_inputs(24, torch.bfloat16)
    y, q, k, v, w1, w2 = (x.detach().double() for x in inputs)
    expected = torch.empty_like(y)
    for t in range(24):
        seen = list(range(max(0, t - 5), t + 1))
        weights = [torch.softmax(SCALE * (k[seen, h] @ q[t, h]), 0) for h in range(HEADS)]
        mixture = sum(w1[t, h] * weights[h] for h in range(HEADS))
        for h in range(HEADS):
            rounded = (w2[t, h] * mixture).bfloat16().double()
            expected[t, h] = y[t, h] + rounded @ v[seen, h]
    out = mix_heads(*inputs, torch.tensor([0, 24], dtype=torch.int32), window=6, scale=SCALE)
    assert out.dtype == torch.bfloat16
    assert (out == expected.bfloat16()).float().mean() > 0.99  # fp32 sums may round to the other side
    assert relative_error(out, expected) < 2e-3
    gradients = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_the_backward_pass_is_the_same_every_time_under_deterministic_algorithms():
    inputs, ends = make_inputs(64, torch.bfloat16), torch.tensor([0, 30, 64], dtype=torch.int32)
    grad = torch.randn(64, HEADS, HEAD_DIM).bfloat16()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(mix_heads(*inputs, ends, window=7, scale=SCALE), inputs, grad) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_custom_operation_is_well_formed():
    _, q, k, v, w1, w2 = make_inputs(12)
    first = torch.tensor([0] * 5 + [5] * 7, dtype=torch.int32)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    torch.library.opcheck(head_mixing._mix_heads, (q, k, v, w1, w2, first, scale, 4, False))


def test_normalized_weights_by_hand():
    w1 = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1e-3, 1e-3]])
    root = [(12.5 + 1e-6) ** 0.5, 1e-3, (1e-6 + 1e-6) ** 0.5]
    expected = torch.stack([row / r for row, r in zip(w1, root, strict=True)])
    torch.testing.assert_close(normalized_weights(w1), expected)
    assert normalized_weights(w1.bfloat16()).dtype == torch.bfloat16


def test_documents_do_not_mix():
    """Changing one document changes nothing in the others."""
    ends = torch.tensor([0, 7, 15, 20], dtype=torch.int32)
    inputs = make_inputs(20)
    before = mix_heads(*inputs, ends, window=6, scale=SCALE)
    with torch.no_grad():
        for x in inputs:
            x[7:15] += 1
    after = mix_heads(*inputs, ends, window=6, scale=SCALE)
    same = [bool(torch.equal(a, b)) for a, b in itertools.islice(zip(before, after, strict=True), 20)]
    assert same == [True] * 7 + [False] * 8 + [True] * 5
