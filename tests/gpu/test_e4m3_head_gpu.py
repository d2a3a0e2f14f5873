"""The head's loss with logits in e4m3 on the GPU: the kernels against fp64, and the whole head against its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_specs import relative_error
from torch import Tensor

from nanogpt.kernels.cross_entropy import _plain_head_loss, head_loss, softcap
from nanogpt.kernels.e4m3_head import e4m3_cross_entropy
from nanogpt.kernels.fp8_head import Fp8Scales, fake_quantize, scaled_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs sm_89"
    ),
]
SOFTCAP: dict[str, Any] = {"cap": 23.0, "shift": 5.0, "scale": 7.5}
SCALES = Fp8Scales(weight=2.0 / 448, gradient=0.75 / 8 / 448, logits8=True)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WIDTH = 768


def make_terms(tokens: int, vocab: int, terms: int, *, prefixes: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Targets and weights; several terms of a row share a column; a third of the rows has no prefix."""
    targets = torch.randint(vocab, (tokens,), device="cuda")
    targets[1:3], targets[4:5], targets[-1] = targets[0], 0, vocab - 1
    some = (7 * targets + 3) % vocab
    some[1::3], some[0] = -1, targets[0]
    weights = torch.tensor([1.0, 0.5, 0.25][:terms], device="cuda")
    return targets, weights, {"prefixes": some, "prefix_weight": weights.new_tensor(0.25)} if prefixes else {}


def by_fp64(logits: Tensor, targets: Tensor, weights: Tensor, **prefixes: Tensor) -> tuple[Tensor, Tensor]:
    """Losses by token and their sum's gradient in the logits."""
    logits = logits.double().requires_grad_()
    log_p, tokens = softcap(logits, **SOFTCAP).log_softmax(1), len(logits)
    losses = log_p.new_zeros(tokens)
    for k, weight in enumerate(weights.tolist()):
        rest = max(tokens - k, 0)
        term = -weight * log_p[:rest].gather(1, targets[k:, None]).squeeze(1)
        losses = losses + torch.nn.functional.pad(term, (0, tokens - rest))
    if prefixes:
        has, weight = prefixes["prefixes"] >= 0, prefixes["prefix_weight"].double()
        term = -weight * log_p.gather(1, prefixes["prefixes"].clamp(min=0)[:, None]).squeeze(1)
        losses = losses + torch.where(has, term, 0)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@pytest.mark.parametrize("logit_std", [0.0, 0.15, 4.0, 60.0])
@pytest.mark.parametrize(
    ("tokens", "vocab", "terms", "prefixes"),
    [
        (16, 16, 3, True),
        (16, 96, 1, False),
        (272, 4_176, 3, True),  # no multiple of a tile, nor of a row's blocks, either way
        (1_040, 10_240, 2, True),
        (2_048, 14_336, 1, False),
        (1_024, 24_576, 1, False),
        (1_072, 50_304, 3, True),
        (16, 131_072, 2, False),
    ],
)
def test_kernels_equal_fp64_on_the_same_logits(tokens, vocab, terms, prefixes, logit_std):
    torch.manual_seed(tokens)
    logits = (logit_std * torch.randn(tokens, vocab, device="cuda")).clamp(-448, 448).to(E4M3)
    targets, weights, more = make_terms(tokens, vocab, terms, prefixes=prefixes)
    losses, exact = by_fp64(logits, targets, weights, **more)
    factor = 1 / SCALES.gradient
    rounded = (factor * exact).float().to(E5M2)
    found, grad, transposed = e4m3_cross_entropy(logits, targets, weights, **more, **SOFTCAP, grad_factor=factor)
    others = (grad.view(torch.uint8) != rounded.view(torch.uint8)).double().mean().item()
    error, ideal = (relative_error(g.double() / factor, exact) for g in (grad, rounded))
    print(f"{tokens} x {vocab}, std {logit_std}: error {error:.4e}, rounded once {ideal:.4e}; other bytes {others:.1e}")
    assert relative_error(found, losses) < 1e-6
    assert torch.equal(transposed.view(torch.uint8), grad.view(torch.uint8).mT), "both layouts"
    assert error < ideal * 1.01 + 1e-4
    assert others < 1e-3, "where fp32 tips the balance"
    alone = e4m3_cross_entropy(logits, targets, weights, **more, **SOFTCAP, need_grad=False)
    assert torch.equal(alone[0], found) and alone[1:] == (None, None)


def test_every_e4m3_number_is_read_and_gradients_of_every_size_are_rounded():
    """A row of 256 columns, one for each byte but NaN's two; factors from below e5m2's least number to its largest."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes[0x7F], codes[0xFF] = 0, 0
    logits = codes.view(E4M3).repeat(16, 1)
    targets, weights, _ = make_terms(16, 256, 1, prefixes=False)
    losses, exact = by_fp64(logits, targets, weights)
    for power in range(-20, 14):
        found, grad, _ = e4m3_cross_entropy(logits, targets, weights, **SOFTCAP, grad_factor=2.0**power)
        assert relative_error(found, losses) < 1e-6
        rounded = (2.0**power * exact).float().to(E5M2)
        assert (grad.view(torch.uint8) != rounded.view(torch.uint8)).sum() < 40
        torch.testing.assert_close(grad.float(), rounded.float(), rtol=0.26, atol=2**-16)


def test_nan_in_a_single_logit_reaches_the_loss_and_the_targets_columns():
    logits = torch.randn(32, 50_304, device="cuda").to(E4M3)
    logits.view(torch.uint8)[2, 777] = 0x7F
    targets, weights, _ = make_terms(32, 50_304, 2, prefixes=False)
    losses, grad, transposed = e4m3_cross_entropy(logits, targets, weights, **SOFTCAP)
    assert losses.isnan().nonzero().tolist() == [[2]]
    assert grad.float().isnan().any(1).nonzero().tolist() == [[2]]
    assert grad[2, targets[2]].float().isnan() and transposed[targets[3], 2].float().isnan()


@pytest.mark.parametrize(
    ("tokens", "columns", "terms"), [(16_384, 10_240, 3), (49_152, 14_336, 1), (49_152, 24_576, 1), (16_384, 50_304, 1)]
)
def test_head_at_the_record_shapes(tokens, columns, terms):
    """Against its own logits' plain cross-entropy between products in fp32, and against fp64."""
    torch.manual_seed(tokens)
    x = torch.nn.functional.rms_norm(torch.randn(tokens, WIDTH, device="cuda"), (WIDTH,)).bfloat16().requires_grad_()
    lm_head = (3 / WIDTH**0.5 * torch.randn(WIDTH, columns, device="cuda")).clamp(-2, 2).bfloat16().requires_grad_()
    targets, weights, more = make_terms(tokens, columns, terms, prefixes=terms > 1)
    loss = head_loss(x, lm_head, targets, weights, **more, **SOFTCAP, precision="fp8", fp8=SCALES)
    found = loss.detach(), *torch.autograd.grad(loss * 0.125, (x, lm_head))

    with torch.no_grad():
        x8, w8 = (fake_quantize(t, s, E4M3) for t, s in ((x, SCALES.x), (lm_head, SCALES.weight)))
        bytes8 = (x8 / SCALES.x).to(E4M3), (w8 / SCALES.weight).to(E4M3).mT.contiguous()
        logits = scaled_product(bytes8[0], SCALES.x, bytes8[1], SCALES.weight, out_dtype=E4M3, fast=True)
        factor = 1 / SCALES.gradient
        parts = e4m3_cross_entropy(logits, targets, weights, **more, **SOFTCAP, grad_factor=factor, plain=True)
        grad = parts[1].float()
        same = parts[0].sum(), grad @ w8.mT * (0.125 / factor), x8.mT @ grad * (0.125 / factor)
        exact = list(
            _plain_head_loss(x.double(), lm_head.double(), targets, weights, *more.values(), **SOFTCAP, need_grad=True)
        )
        exact[1:] = (0.125 * g for g in exact[1:])
    for name, out, part, ref in zip(("loss", "dx", "dW"), found, same, exact, strict=True):
        errors = relative_error(out, part), relative_error(out, ref), relative_error(part, ref)
        print(f"{tokens} x {columns} {name}: to plain, to fp64, plain to fp64: {', '.join(f'{e:.2e}' for e in errors)}")
        assert errors[0] < {"loss": 1e-5, "dx": 4e-3, "dW": 4e-3}[name]
        assert errors[1] < 1.02 * errors[2] + 3e-3
    assert found[1].dtype == found[2].dtype == torch.bfloat16


def test_captured_it_follows_its_inputs():
    """No synchronisation, and replays read new inputs and weights where the first ones lay."""
    torch.manual_seed(0)
    inputs = []
    for seed in range(2):
        x = torch.nn.functional.rms_norm(torch.randn(1_024, WIDTH, device="cuda"), (WIDTH,)).bfloat16()
        lm_head = (3 / WIDTH**0.5 * torch.randn(WIDTH, 10_240, device="cuda")).clamp(-2, 2).bfloat16()
        targets, weights, more = make_terms(1_024, 10_240, 2, prefixes=True)
        inputs.append((x, lm_head, targets, weights / (1 + seed), *more.values()))
    held = [t.clone() for t in inputs[0]]
    held[0].requires_grad_(), held[1].requires_grad_()

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, lm_head, targets, weights, prefixes, prefix_weight = tensors
        terms = {"prefixes": prefixes, "prefix_weight": prefix_weight}
        loss = head_loss(x, lm_head, targets, weights, **terms, **SOFTCAP, precision="fp8", fp8=SCALES)
        return loss.detach(), *torch.autograd.grad(loss * 0.125, (x, lm_head))

    expected = [step(*(t.requires_grad_() if t.dtype == torch.bfloat16 else t for t in given)) for given in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*held)
    for given, wanted in zip(inputs, expected, strict=True):
        with torch.no_grad():
            for place, tensor in zip(held, given, strict=True):
                place.copy_(tensor)
        graph.replay()
        assert all(relative_error(a, b) < 2e-3 for a, b in zip(found, wanted, strict=True))
