"""The cross-entropy of e4m3 logits: in plain PyTorch, and the kernels by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from small_specs import relative_error
from torch import Tensor
from triton_interpreter import needs_triton, run_interpreted

from nanogpt.kernels.cross_entropy import head_loss, softcap
from nanogpt.kernels.e4m3_head import e4m3_cross_entropy
from nanogpt.kernels.fp8_head import Fp8Scales, fake_quantize, fp8_head_loss

SOFTCAP = {"cap": 23.0, "shift": 5.0, "scale": 7.5}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Case(NamedTuple):
    """Logits and the loss's terms."""

    logits: Tensor  # (T, V) e4m3
    targets: Tensor  # (T,)
    weights: Tensor  # (K,)
    prefixes: Tensor | None  # (T,)
    prefix_weight: Tensor | None


def make_case(tokens: int, vocab: int, terms: int, *, prefixes: bool, logit_std: float = 4.0) -> Case:
    """Several terms share a column; a prefix is the target, one is the next target, one of three is none."""
    torch.manual_seed(tokens * vocab)
    targets = torch.randint(vocab, (tokens,))
    targets[1:3] = targets[0]
    targets[4:5] = 0
    some = (7 * targets + 3) % vocab
    some[1::3], some[0], some[2::7] = -1, targets[0], targets.roll(-1)[2::7]
    return Case(
        (logit_std * torch.randn(tokens, vocab)).clamp(-448, 448).to(E4M3),
        targets,
        torch.tensor([1.0, 0.5, 0.25][:terms]),
        some if prefixes else None,
        torch.tensor(0.3) if prefixes else None,
    )


def by_fp64(case: Case) -> tuple[Tensor, Tensor]:
    """Losses by token, and the gradient of their sum in the logits, token by token."""
    logits = case.logits.double().requires_grad_()
    log_p = softcap(logits, **SOFTCAP).log_softmax(1)
    losses = []
    for token in range(len(log_p)):
        terms = list(zip(case.weights, case.targets[token:], strict=False))
        if case.prefixes is not None and case.prefixes[token] >= 0:
            terms.append((case.prefix_weight, case.prefixes[token]))
        losses.append(sum(-weight.double() * log_p[token, column] for weight, column in terms))
    (grad,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
    return torch.stack(losses).detach(), grad


def check(case: Case, grad_factor: float = 4_000.0, **options: bool) -> None:
    """Against fp64, both layouts; the gradient as near as rounding once allows."""
    logits, targets, weights, *prefixes = case
    given = dict(zip(("prefixes", "prefix_weight"), prefixes, strict=True)) | SOFTCAP | options
    losses, grad, transposed = e4m3_cross_entropy(logits, targets, weights, **given, grad_factor=grad_factor)
    expected, exact = by_fp64(case)
    assert relative_error(losses, expected) < 1e-6
    assert torch.equal(transposed.view(torch.uint8), grad.view(torch.uint8).mT)
    rounded = (grad_factor * exact).float().to(E5M2).double()
    assert relative_error(grad.double(), rounded) < 3e-3  # where fp32 tips the balance
    alone = e4m3_cross_entropy(logits, targets, weights, **given, need_grad=False)
    assert torch.equal(alone[0], losses) and alone[1:] == (None, None)


SHAPES = ((1, 16, 3), (2, 96, 3), (48, 160, 1), (37, 200, 2), (64, 1_040, 3))


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize(("tokens", "vocab", "terms"), SHAPES)
def test_plain_against_fp64(tokens, vocab, terms, prefixes):
    check(make_case(tokens, vocab, terms, prefixes=prefixes))


@pytest.mark.parametrize("logit_std", [0.0, 0.1, 200.0])
def test_plain_far_from_the_usual_logits(logit_std):
    check(make_case(48, 160, 3, prefixes=True, logit_std=logit_std))


def test_a_logit_that_is_not_a_number_reaches_the_loss_of_its_row():
    case = make_case(4, 96, 2, prefixes=False)
    case.logits[2, 77] = float("nan")
    losses, grad, _ = e4m3_cross_entropy(*case[:3], **SOFTCAP)
    assert losses.isnan().tolist() == grad.float().isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("prefixes", [False, True])
def test_between_emulated_products_it_is_the_plain_head(prefixes):
    case = make_case(48, 160, 3, prefixes=prefixes)
    _, targets, weights, *terms = case
    terms = dict(zip(("prefixes", "prefix_weight"), terms, strict=True))
    scales = Fp8Scales(weight=2.0 / 448, gradient=0.75 / 8 / 448, logits8=True)
    x, lm_head = torch.randn(48, 32).requires_grad_(), (0.6 * torch.randn(32, 160)).requires_grad_()
    loss = head_loss(x, lm_head, targets, weights, **terms, **SOFTCAP, precision="fp8", fp8=scales)
    dx, dw = torch.autograd.grad(loss, (x, lm_head))

    x8, w8 = (fake_quantize(t.detach(), s, E4M3) for t, s in ((x, scales.x), (lm_head, scales.weight)))
    logits = (x8 @ w8).clamp(-448, 448).to(E4M3)
    factor = 1 / scales.gradient
    losses, grad, transposed = e4m3_cross_entropy(logits, targets, weights, **terms, **SOFTCAP, grad_factor=factor)
    assert relative_error(losses.sum(), loss.detach()) < 1e-6
    assert relative_error(grad.float() @ w8.mT / factor, dx) < 1e-3
    assert relative_error((transposed.float() @ x8).mT / factor, dw) < 1e-3


# ---------------------------------------------------------------- the kernels


def interpreted() -> None:
    """In a process of its own: the kernels on a CPU, whose inline assembly NumPy takes over."""
    from unittest import mock

    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from nanogpt.kernels import e4m3_head, e4m3_head_triton, fp8_head_triton

    def words(function: Callable[..., Any], *tensors: Any) -> Any:
        """The words (...,) that `function` makes as bytes (..., 4), each from the numbers of Triton's tensors."""
        numbers = np.broadcast_arrays(*(x.handle.data for x in tensors))
        data = np.ascontiguousarray(function(*numbers)).view(np.int32)[..., 0]
        return tl.tensor(TensorHandle(data, tl.int32), tl.block_type(tl.int32, [*data.shape]))

    def pack(*tensors: Any) -> Any:
        return words(lambda *x: torch.from_numpy(np.stack(x, -1)).to(E5M2).view(torch.uint8).numpy(), *tensors)

    def permute(a: Any, b: Any, select: str) -> Any:
        digits = [int(digit) for digit in reversed(select[2:])]
        return words(lambda *x: np.stack(x, -1).view(np.uint8)[..., digits], a, b)

    def quantize(values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The interpreter's conversion to e4m3 loses the carry into the exponent."""
        same = (values.float() * (1 / scale)).clamp(-448, 448).to(E4M3)
        return same, same.mT.contiguous()

    small: dict[str, Any] = {
        "LOSSES": e4m3_head_triton.Config(columns=64, warps=1),
        "GRADIENT": e4m3_head_triton.Tile(rows=4, columns=8, warps=1),
        "TARGET_ROWS": 16,
    }
    with (
        mock.patch.object(e4m3_head, "runs_kernel", lambda *tensors, **needs: True),
        mock.patch.multiple(e4m3_head_triton, _pack_e5m2=pack, _permute=permute, **small),
        mock.patch.object(fp8_head_triton, "quantize_both_ways", quantize),
    ):
        for tokens, vocab, terms, prefixes in ((16, 64, 1, False), (16, 48, 2, True), (48, 160, 3, True)):
            check(make_case(tokens, vocab, terms, prefixes=prefixes))
        whole_head(make_case(32, 80, 2, prefixes=True))


def whole_head(case: Case) -> None:
    """The 8-bit path, products included, against the plain one."""
    x, lm_head = (
        torch.randn(32, 48).bfloat16().requires_grad_(),
        (0.5 * torch.randn(48, 80)).bfloat16().requires_grad_(),
    )
    scales = Fp8Scales(weight=2.0 / 448, gradient=0.75 / 8 / 448, logits8=True)
    of_op = {"x_scale": scales.x, "w_scale": scales.weight, "grad_scale": scales.gradient, "logits8": True}
    loss = fp8_head_loss(x, lm_head, *case[1:], **SOFTCAP, **of_op, need_grad=True)[0]
    terms = {"prefixes": case.prefixes, "prefix_weight": case.prefix_weight}
    plain = head_loss(x, lm_head, case.targets, case.weights, **terms, **SOFTCAP, precision="fp8", fp8=scales)
    assert relative_error(loss.detach(), plain.detach()) < 1e-6
    found, expected = (torch.autograd.grad(0.125 * value, (x, lm_head)) for value in (loss, plain))
    assert all(relative_error(a, b) < 3e-3 for a, b in zip(found, expected, strict=True))


@needs_triton
def test_the_kernels_in_the_interpreter():
    run_interpreted(__file__)


if __name__ == "__main__":
    interpreted()
