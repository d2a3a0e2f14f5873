"""The head's loss on the GPU: kernels against fp64, FP8 and bf16 against plain equivalents, compilation, memory."""

from __future__ import annotations

import pytest
import torch

from nanogpt.kernels.cross_entropy import _plain_head_loss, head_loss, head_loss_reference, head_mean_loss, softcap
from nanogpt.kernels.fp8_head import GRAD_SCALE, X_SCALE, fake_quantize, select_head_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs sm_90"
)
CONSTANTS = {"cap": 23.0, "shift": 5.0, "scale": 7.5}
WIDTH, VOCAB = 768, 50_304


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def head_inputs(tokens, width=WIDTH, vocab=VOCAB, *, logit_std=3.0):
    """A normalised input, weights that give logits of the standard deviation asked for, targets."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, width, device="cuda")
    x = torch.nn.functional.rms_norm(x, (width,)).bfloat16().requires_grad_()
    lm_head = (torch.randn(width, vocab, device="cuda") * logit_std / width**0.5).bfloat16().requires_grad_()
    return x, lm_head, torch.randint(0, vocab, (tokens,), device="cuda")


def token_weights(terms):
    return torch.tensor([1.0, 0.5, 0.25][:terms], device="cuda")


def rows_by_fp64(logits, targets, weights):
    """Losses by token and their sum's gradient in the logits, in fp64."""
    logits = logits.detach().double().requires_grad_()
    z = softcap(logits, **CONSTANTS)
    lse, losses = z.logsumexp(1), z.new_zeros(len(z))
    for k, weight in enumerate(weights.tolist()):
        n = max(len(z) - k, 0)
        term = weight * (lse[:n] - z[:n].gather(1, targets[k:, None]).squeeze(1))
        losses = losses + torch.nn.functional.pad(term, (0, len(z) - n))
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@pytest.mark.parametrize("logit_std", [0.0, 0.15, 4.0, 60.0])
@pytest.mark.parametrize(
    ("tokens", "vocab", "terms"),
    [(512, VOCAB, 1), (512, VOCAB, 2), (512, VOCAB, 3), (1, VOCAB, 3), (2, 96, 3), (37, 4_168, 3), (16, 131_072, 2)],
)
def test_kernel_equals_fp64_on_the_same_logits(tokens, vocab, terms, logit_std):
    from nanogpt.kernels.cross_entropy_triton import loss_and_gradient

    torch.manual_seed(tokens)
    logits = (logit_std * torch.randn(tokens, vocab, device="cuda")).bfloat16()
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    targets[1:3] = targets[0]  # several terms of a row on one column
    weights = token_weights(terms)
    losses, grad = rows_by_fp64(logits, targets, weights)

    e5m2 = torch.full_like(logits, float("nan"), dtype=torch.float8_e5m2)
    bf16 = torch.full_like(logits, float("nan"))
    got = loss_and_gradient(logits, targets, weights, e5m2, **CONSTANTS, grad_factor=1 / GRAD_SCALE)
    assert relative_error(got, losses) < 1e-6
    assert relative_error(loss_and_gradient(logits, targets, weights, bf16, **CONSTANTS), losses) < 1e-6
    assert relative_error(loss_and_gradient(logits, targets, weights, None, **CONSTANTS), losses) < 1e-6
    assert relative_error(bf16, grad) < 3e-3
    rounded_once = (grad.float() / GRAD_SCALE).to(torch.float8_e5m2)
    ideal = relative_error(rounded_once.double() * GRAD_SCALE, grad)
    error = relative_error(e5m2.double() * GRAD_SCALE, grad)
    print(f"{tokens} x {vocab}, {terms} terms, std {logit_std}: e5m2 gradient {error:.3e}, rounded once {ideal:.3e}")
    assert error < ideal * 1.01 + 1e-4
    # In place, as the bf16 head uses it.
    assert loss_and_gradient(logits, targets, weights, logits, **CONSTANTS).isfinite().all()
    assert torch.equal(logits, bf16)


def test_nan_in_a_single_logit_reaches_the_loss():
    from nanogpt.kernels.cross_entropy_triton import loss_and_gradient

    logits = torch.randn(4, VOCAB, device="cuda").bfloat16()
    logits[2, 777] = float("nan")
    targets = torch.zeros(4, dtype=torch.int64, device="cuda")
    losses = loss_and_gradient(logits, targets, token_weights(1), logits.clone(), **CONSTANTS)
    assert losses.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(("tokens", "terms"), [(16_384, 3), (32_768, 2), (49_152, 1)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=needs_hopper)])
def test_head_at_the_record_shapes(tokens, terms, precision):
    x, lm_head, targets = head_inputs(tokens)
    weights = token_weights(terms)
    loss = head_loss(x, lm_head, targets, weights, **CONSTANTS, precision=precision)
    grads = torch.autograd.grad(loss * 0.125, (x, lm_head))

    def by_chunks(dtype, fp8):
        inputs = (t.detach().to(dtype) for t in (x, lm_head))
        with torch.no_grad():
            out, dx, dw = _plain_head_loss(*inputs, targets, weights, **CONSTANTS, fp8=fp8, need_grad=True)
        return out, 0.125 * dx, 0.125 * dw

    exact, plain = by_chunks(torch.float64, False), by_chunks(torch.bfloat16, precision == "fp8")
    for name, out, ref, same in zip(("loss", "dx", "dW"), (loss, *grads), exact, plain, strict=True):
        print(
            f"{precision} T={tokens} K={terms} {name}: fast to fp64 {relative_error(out, ref):.2e}, "
            f"plain to fp64 {relative_error(same, ref):.2e}, fast to plain {relative_error(out, same):.2e}"
        )
        # FP8's fast accumulation, which the emulation does not have, moves single logits by a last bf16 bit.
        loss_bound = 5e-5 if precision == "fp8" else 2e-6
        assert relative_error(out, ref) < (1e-4 if name == "loss" else 1.02 * relative_error(same, ref) + 3e-3)
        assert relative_error(out, same) < {"loss": loss_bound, "dx": 1e-2, "dW": 1e-2}[name]
    assert grads[0].dtype == grads[1].dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=needs_hopper)])
def test_zero_weights(precision):
    """The start of a run with a zero head: uniform predictions, no gradient in x."""
    x, lm_head, targets = head_inputs(4_096, logit_std=0.0)
    loss = head_loss(x, lm_head, targets, token_weights(1), **CONSTANTS, precision=precision)
    dx, dw = torch.autograd.grad(loss, (x, lm_head))
    assert abs(loss.item() / 4_096 - torch.tensor(float(VOCAB)).log().item()) < 1e-5
    assert not dx.any() and dw.isfinite().all() and dw.any()


@needs_hopper
def test_eight_bit_copies_are_exact():
    from nanogpt.kernels.fp8_head_triton import quantize_both_ways, transpose_bytes

    for shape in ((4_112, 768), (768, VOCAB), (16, 16)):
        x = 10 * torch.randn(shape, device="cuda").bfloat16()
        x[0, 0], x[-1, -1] = 1e6, -1e6
        same, transposed = quantize_both_ways(x, X_SCALE)
        expected = fake_quantize(x, X_SCALE, torch.float8_e4m3fn)
        assert torch.equal(same.float() * X_SCALE, expected)
        assert torch.equal(transposed.view(torch.uint8), same.view(torch.uint8).t())
        assert torch.equal(transpose_bytes(same).view(torch.uint8), transposed.view(torch.uint8))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=needs_hopper)])
def test_any_incoming_gradient(precision):
    x, lm_head, targets = head_inputs(512)
    weights = token_weights(2)
    once, many = (
        torch.autograd.grad(
            factor * head_loss(x, lm_head, targets, weights, **CONSTANTS, precision=precision), (x, lm_head)
        )
        for factor in (1.0, 0.3)
    )
    assert all(relative_error(b, 0.3 * a.double()) < 3e-3 for a, b in zip(once, many, strict=True))


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=needs_hopper)])
def test_compiles_whole_without_recompilation_or_host_sync(precision):
    x, lm_head, targets = head_inputs(1_024)

    def step(x, lm_head, targets, weights):
        return head_loss(
            torch.nn.functional.rms_norm(x, (WIDTH,)), lm_head, targets, weights, **CONSTANTS, precision=precision
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    weights = token_weights(3)
    schedule = torch.tensor([[1.0, 0.5, 0.25 - 0.05 * i] for i in range(4)], device="cuda")
    losses = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(4):
            if i == 2:
                torch.cuda.set_sync_debug_mode("error")
            weights.copy_(schedule[i])
            loss = compiled(x, lm_head, targets, weights)
            grads = torch.autograd.grad(loss * 0.125, (x, lm_head))
            losses.append(loss.detach().clone())
        torch.cuda.set_sync_debug_mode("default")
    assert len({loss.item() for loss in losses}) == 4
    eager = step(x, lm_head, targets, weights)
    assert relative_error(losses[-1], eager.detach()) < 1e-4
    eager_grads = torch.autograd.grad(eager * 0.125, (x, lm_head))
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(grads, eager_grads, strict=True))
    compiled(x, lm_head, targets, token_weights(2))  # another number of terms: compiled once more


def test_evaluation_at_validation_size():
    x, lm_head, targets = head_inputs(262_144)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = head_mean_loss(x.detach(), lm_head.detach(), targets, **CONSTANTS)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"evaluation of 262,144 tokens: {peak / 1e9:.1f} GB above its inputs")
    assert peak < 4e9
    part = slice(0, 8_192)
    with torch.no_grad():
        reference = head_loss_reference(x[part], lm_head, targets[part], token_weights(1), **CONSTANTS) / 8_192
        same = head_mean_loss(x[part], lm_head, targets[part], **CONSTANTS)
    assert relative_error(same, reference) < 1e-6
    assert abs(loss.item() - reference.item()) < 0.05


@needs_hopper
def test_this_gpu_takes_fp8():
    assert select_head_precision("auto", torch.cuda.get_device_capability())[0] == "fp8"
