"""The head's loss on a CPU: the chunked path against the definition, FP8 emulated, what the trainer relies on."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanogpt.errors import InputError
from nanogpt.kernels import cross_entropy
from nanogpt.kernels.cross_entropy import head_loss, head_loss_reference, head_mean_loss, head_token_losses, softcap
from nanogpt.kernels.fp8_head import (
    GRAD_SCALE,
    W_SCALE,
    X_SCALE,
    fake_quantize,
    fp8_products_work,
    select_head_precision,
)
from nanogpt.kernels.fp8_mlp import NEEDS as FP8_MLP

HALVED = (1.0, 0.5, 0.25)
SOFTCAP = {"cap": 23.0, "shift": 5.0, "scale": 7.5}


def head_inputs(tokens=37, width=16, vocab=96, *, terms=3, dtype=torch.float64, logit_std=3.0):
    torch.manual_seed(tokens * width * vocab)
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    lm_head = (torch.randn(width, vocab) * logit_std / width**0.5).to(dtype).requires_grad_()
    return x, lm_head, torch.randint(0, vocab, (tokens,)), torch.tensor(HALVED[:terms])


def relative_error(out, reference):
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def loss_and_gradients(function, x, lm_head, targets, weights, factor=0.125, **options):
    loss = function(x, lm_head, targets, weights, **SOFTCAP | options)
    return loss.detach(), *torch.autograd.grad(factor * loss, (x, lm_head))


def test_softcap_by_hand():
    assert softcap(torch.tensor(-5.0), **SOFTCAP) == 11.5
    assert softcap(torch.tensor(2.5).bfloat16(), **SOFTCAP).item() == pytest.approx(23 / (1 + 2.718281828**-1))
    assert softcap(torch.zeros(2).bfloat16(), **SOFTCAP).dtype == torch.float32
    assert softcap(torch.zeros(2).double(), **SOFTCAP).dtype == torch.float64


def test_definition_by_hand():
    """Three tokens, two columns, two terms, written out."""
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 4.0]], dtype=torch.float64)
    z = 23 / (1 + (-(logits + 5) / 7.5).exp())
    p = z.exp() / z.exp().sum(1, keepdim=True)
    by_hand = -(p[0, 1].log() + p[1, 0].log() + p[2, 1].log()) - 0.5 * (p[0, 0].log() + p[1, 1].log())
    eye, targets = torch.eye(2, dtype=torch.float64), torch.tensor([1, 0, 1])
    for function in (head_loss, head_loss_reference):
        assert function(logits, eye, targets, torch.tensor([1.0, 0.5]), **SOFTCAP).item() == pytest.approx(
            by_hand.item()
        )
    next_token = -(p[0, 1].log() + p[1, 0].log() + p[2, 1].log()) / 3
    assert head_mean_loss(logits, eye, targets, **SOFTCAP).item() == pytest.approx(next_token.item())


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 37, 300])
def test_fp64_equals_definition(tokens, terms):
    """Also where a micro-batch is shorter than the number of terms, and where it does not fill its last chunk."""
    inputs = head_inputs(tokens, terms=terms)
    expected = loss_and_gradients(head_loss_reference, *inputs)
    for out, reference in zip(loss_and_gradients(head_loss, *inputs), expected, strict=True):
        assert relative_error(out, reference) < 1e-12


def test_gradcheck():
    x, lm_head, targets, weights = head_inputs(7, 4, 11)
    assert torch.autograd.gradcheck(
        lambda x, w: head_loss(x, w, targets, weights, **SOFTCAP | {"cap": 15.0}), (x, lm_head)
    )


@pytest.mark.parametrize(("dtype", "loss_error", "gradient_error"), [("float32", 1e-6, 1e-5), ("bfloat16", 1e-6, 4e-3)])
def test_lower_precision_equals_definition_in_that_precision(dtype, loss_error, gradient_error):
    inputs = head_inputs(300, 64, 512, dtype=getattr(torch, dtype))
    expected = loss_and_gradients(head_loss_reference, *inputs)
    out = loss_and_gradients(head_loss, *inputs)
    assert out[0].dtype == torch.float32
    assert out[1].dtype == out[2].dtype == getattr(torch, dtype)
    assert relative_error(out[0], expected[0]) < loss_error
    assert all(relative_error(a, b) < gradient_error for a, b in zip(out[1:], expected[1:], strict=True))


def test_other_constants_and_large_logits():
    inputs = head_inputs(50, terms=2, logit_std=80.0)
    options = {"cap": 30.0, "shift": 0.0, "scale": 30.0}
    expected = loss_and_gradients(head_loss_reference, *inputs, **options)
    out = loss_and_gradients(head_loss, *inputs, **options)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_zero_weights_predict_uniformly(precision):
    x, lm_head, targets, weights = head_inputs(40, 16, 96, terms=1, dtype=torch.float32, logit_std=0.0)
    loss, dx, dw = loss_and_gradients(head_loss, x, lm_head, targets, weights, precision=precision)
    assert loss.item() == pytest.approx(40 * torch.tensor(96.0).log().item(), rel=1e-6)
    assert not dx.any() and dw.any()


def test_a_nan_weight_makes_the_loss_nan():
    x, lm_head, targets, weights = head_inputs(20, dtype=torch.float32)
    with torch.no_grad():
        lm_head[3, 5] = float("nan")
    assert head_loss(x, lm_head, targets, weights, **SOFTCAP).isnan()


def test_only_one_input_needs_a_gradient():
    x, lm_head, targets, weights = head_inputs()
    _, dx, dw = loss_and_gradients(head_loss, x, lm_head, targets, weights, factor=1.0)
    assert torch.equal(torch.autograd.grad(head_loss(x, lm_head.detach(), targets, weights, **SOFTCAP), x)[0], dx)
    assert torch.equal(torch.autograd.grad(head_loss(x.detach(), lm_head, targets, weights, **SOFTCAP), lm_head)[0], dw)
    with torch.no_grad():
        assert not head_loss(x, lm_head, targets, weights, **SOFTCAP).requires_grad


def test_mean_loss_is_the_first_term():
    x, lm_head, targets, _ = head_inputs(300)
    one = torch.ones(1)
    mean = head_mean_loss(x, lm_head, targets, **SOFTCAP)
    assert not mean.requires_grad
    assert relative_error(mean, head_loss_reference(x, lm_head, targets, one, **SOFTCAP).detach() / 300) < 1e-12


def test_fp8_scales_are_the_public_ones():
    """Spelled out: another power of two would round most numbers alike, and no comparison of results would see it."""
    assert (X_SCALE, W_SCALE, GRAD_SCALE) == (100 / 448, 1.6 / 448, 0.75 / 448)


@pytest.mark.parametrize("terms", [1, 3])
def test_fp8_emulation_equals_its_formula(terms):
    """The specified roundings, written around autograd: e4m3 in, bf16 logits, e5m2 logit gradient."""
    x, lm_head, targets, weights = head_inputs(48, 32, 160, terms=terms, dtype=torch.bfloat16)
    grad_scale = 0.125
    x8 = (x.detach().float() / (100 / 448)).to(torch.float8_e4m3fn).float() * (100 / 448)
    w8 = (lm_head.detach().float() / (1.6 / 448)).to(torch.float8_e4m3fn).float() * (1.6 / 448)
    logits = (x8 @ w8).bfloat16().float().requires_grad_()
    loss = head_loss_reference(logits, torch.eye(160), targets, weights, **SOFTCAP)
    (g,) = torch.autograd.grad(grad_scale * loss, logits)
    grad_s = grad_scale * 0.75 / 448
    g8 = (g / grad_s).to(torch.float8_e5m2).float() * grad_s
    out, dx, dw = loss_and_gradients(head_loss, x, lm_head, targets, weights, factor=grad_scale, precision="fp8")
    assert relative_error(out, loss.detach()) < 1e-6
    assert relative_error(dx, g8 @ w8.t()) < 4e-3
    assert relative_error(dw, x8.t() @ g8) < 4e-3
    assert dx.dtype == dw.dtype == torch.bfloat16


def test_fp8_stays_near_bf16():
    inputs = head_inputs(256, 64, 512, dtype=torch.bfloat16)
    bf16, fp8 = (loss_and_gradients(head_loss, *inputs, precision=p) for p in ("bf16", "fp8"))
    assert relative_error(fp8[0], bf16[0]) < 5e-3
    assert all(1e-3 < relative_error(a, b) < 0.15 for a, b in zip(fp8[1:], bf16[1:], strict=True))


def test_fake_quantize_saturates_e4m3_and_rounds_once():
    values = torch.tensor([0.0, 17.0, 18.0, 1e6, -1e6, float("nan")])
    out = fake_quantize(values, 2.0, torch.float8_e4m3fn)
    assert out[:5].tolist() == [0.0, 16.0, 18.0, 896.0, -896.0] and out[5].isnan()
    assert fake_quantize(torch.tensor([1.125, 1.126]), 1.0, torch.float8_e5m2).tolist() == [1.0, 1.25]


def test_compiled_whole_without_recompilation():
    """Dynamo takes a model around the loss as one graph, whatever the weights' values."""
    x, lm_head, targets, weights = head_inputs(40, dtype=torch.float32)

    def step(x, lm_head, targets, weights, **constants):
        return head_loss(2 * x, lm_head, targets, weights, **constants)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for last in (0.25, 0.1, 0.0):
            weights[2] = last
            expected = loss_and_gradients(step, x, lm_head, targets, weights)
            out = loss_and_gradients(compiled, x, lm_head, targets, weights)
            assert all(relative_error(a, b) < 1e-6 for a, b in zip(out, expected, strict=True))
    assert compiled(x, lm_head, targets, weights[:2], **SOFTCAP).isfinite()


def some_prefixes(targets, vocab=96):
    """A prefix for two tokens of three; among them the target itself, and the next one's."""
    prefixes = (7 * targets + 3) % vocab
    prefixes[1::3] = -1
    prefixes[0], prefixes[2] = targets[0], targets[3]
    return prefixes


def test_prefixes_by_hand():
    """Two tokens, of which one has a prefix: one more cross-entropy in that row."""
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.5, 3.0, -1.0]], dtype=torch.float64)
    z = 23 / (1 + (-(logits + 5) / 7.5).exp())
    p = z.exp() / z.exp().sum(1, keepdim=True)
    by_hand = -(p[0, 1].log() + p[1, 0].log()) - 0.5 * p[0, 0].log() - 0.3 * p[1, 2].log()
    targets, prefixes = torch.tensor([1, 0]), torch.tensor([-1, 2])
    for function in (head_loss, head_loss_reference):
        loss = function(
            logits,
            torch.eye(3, dtype=torch.float64),
            targets,
            torch.tensor([1.0, 0.5]),
            prefixes=prefixes,
            prefix_weight=torch.tensor(0.3),
            **SOFTCAP,
        )
        assert loss.item() == pytest.approx(by_hand.item())


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_prefixes_enter_loss_and_gradients(terms):
    x, lm_head, targets, weights = head_inputs(terms=terms)
    options = {"prefixes": some_prefixes(targets), "prefix_weight": torch.tensor(0.25)}
    out = loss_and_gradients(head_loss, x, lm_head, targets, weights, **options)
    expected = loss_and_gradients(head_loss_reference, x, lm_head, targets, weights, **options)
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(out, expected, strict=True))
    # Nothing but -1, or no weight: as if there were no prefixes.
    plain = loss_and_gradients(head_loss, x, lm_head, targets, weights)
    none = {"prefixes": torch.full_like(targets, -1), "prefix_weight": torch.tensor(0.25)}
    unweighted = {"prefixes": some_prefixes(targets), "prefix_weight": torch.tensor(0.0)}
    for off in (none, unweighted):
        out = loss_and_gradients(head_loss, x, lm_head, targets, weights, **off)
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(out, plain, strict=True))
    assert relative_error(plain[0], expected[0]) > 0.01


def test_prefixes_and_their_weight_come_together():
    x, lm_head, targets, weights = head_inputs()
    with pytest.raises(ValueError, match="both or neither"):
        head_loss(x, lm_head, targets, weights, **SOFTCAP, prefixes=targets)
    with pytest.raises(ValueError, match=r"torch\.int32: expected"):
        head_loss(x, lm_head, targets, weights, **SOFTCAP, prefixes=targets.int(), prefix_weight=torch.tensor(0.1))


@pytest.mark.parametrize("with_prefixes", [True, False])
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("fp8", [True, False])
def test_custom_operation_is_well_formed(fp8, need_grad, with_prefixes):
    x, lm_head, targets, weights = head_inputs(24, dtype=torch.bfloat16)
    prefixes = (some_prefixes(targets), torch.tensor(0.25)) if with_prefixes else ()
    options = {**SOFTCAP, "fp8": fp8, "need_grad": need_grad}
    if not need_grad:
        x, lm_head = x.detach(), lm_head.detach()
    torch.library.opcheck(cross_entropy._plain_head_loss, (x, lm_head, targets, weights, *prefixes), options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 3)}, "expected (T, D) and (D, V)"),
        ({"lm_head": torch.zeros(4, 6).double()}, "expected one dtype"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "expected (5,) torch.int64"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, "torch.int32: expected (5,) torch.int64"),
        ({"weights": torch.ones(1, 1)}, "expected (K,)"),
        ({"cap": 100.0}, "at most 64"),
        ({"cap": 0.0}, "more than 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "x": torch.zeros(5, 4),
        "lm_head": torch.zeros(4, 6),
        "targets": torch.zeros(5, dtype=torch.int64),
        "weights": torch.ones(1),
        **SOFTCAP,
    }
    with pytest.raises(ValueError) as error:
        head_loss(**{**arguments, **change})
    assert message in str(error.value)


def test_select_head_precision():
    works, fails = (lambda: True), (lambda: False)
    hopper, ampere = (9, 0), (8, 0)
    assert select_head_precision("auto", hopper, works) == ("fp8", "compute capability 9.0")
    assert select_head_precision("auto", (10, 0), works)[0] == "fp8"
    assert select_head_precision("fp8", hopper, works)[0] == "fp8"
    assert select_head_precision("bf16", hopper, works) == ("bf16", "requested")
    precision, reason = select_head_precision("auto", ampere, works)
    assert precision == "bf16" and "8.0" in reason and "8.9" in reason
    assert select_head_precision("auto", (8, 9), works)[0] == "fp8"
    for capability in ((8, 9), (10, 0), (12, 0)):  # which have the products, and not the MLP's kernels
        assert select_head_precision("auto", capability, works, kernels=FP8_MLP)[0] == "bf16"
        assert select_head_precision("fp8", capability, works, kernels=FP8_MLP)[0] == "fp8"
    assert select_head_precision("auto", hopper, works, kernels=FP8_MLP)[0] == "fp8"
    precision, reason = select_head_precision("auto", hopper, fails)
    assert precision == "bf16" and "trial" in reason
    assert select_head_precision("auto", None) == ("bf16", "FP8 needs a GPU and bf16 activations")
    assert select_head_precision("fp8", None) == ("fp8", "requested; emulated on a CPU")
    for capability, products_work in ((ampere, works), (hopper, fails)):
        with pytest.raises(InputError, match="use auto or bf16"):
            select_head_precision("fp8", capability, products_work)
    with pytest.raises(InputError, match="'fp16' is unknown; expected auto, fp8 or bf16"):
        select_head_precision("fp16", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_fp8_trial_fails_quietly_without_a_gpu():
    assert not fp8_products_work()


def test_logits_never_exist_whole():
    tokens, vocab = 1_000, 500
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    x, lm_head, targets, weights = (t.detach() for t in head_inputs(tokens, 8, vocab, dtype=torch.float32))
    options = {**SOFTCAP, "fp8": False, "need_grad": True}
    with Sizes():
        cross_entropy._plain_head_loss._init_fn(x, lm_head, targets, weights, **options)
    assert 0 < largest <= 256 * vocab


def test_a_mask_rules_classes_out_by_the_token_before(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_TOKEN_LOSS_CHUNK", 16)
    x, lm_head, targets, _ = head_inputs()
    inputs = torch.randint(0, 96, (37,), dtype=torch.int32)
    ruled_out = torch.rand(96, 96) < 0.4
    ruled_out[inputs[3], targets[3]] = True  # whoever writes what cannot be pays for it
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    mask = (ruled_out.view(96, 12, 8) * bits).sum(2, dtype=torch.uint8)
    z = softcap(x @ lm_head, **SOFTCAP).detach()
    for position, token in enumerate(inputs.tolist()):
        z[position, ruled_out[token]] = -60.0
    expected = -z.log_softmax(1)[torch.arange(37), targets]
    assert expected[3] > 60
    found = head_token_losses(x, lm_head, targets, **SOFTCAP, inputs=inputs, mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for function in (head_mean_loss, torch.compile(head_mean_loss, fullgraph=True, backend="eager")):
        mean = function(x, lm_head, targets, **SOFTCAP, inputs=inputs, mask=mask)
        assert relative_error(mean, expected.mean()) < 1e-12
    nothing = head_token_losses(x, lm_head, targets, **SOFTCAP, inputs=inputs, mask=torch.zeros_like(mask))
    assert torch.equal(nothing, head_token_losses(x, lm_head, targets, **SOFTCAP))
