"""Record 89 on a GPU: the DC kernels, the 8-bit MLP and the prefix term against plain PyTorch, and the whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from small_specs import batch_of, on_gpu

from nanogpt.kernels.bench import document_ends
from nanogpt.kernels.cross_entropy import head_loss
from nanogpt.kernels.fp8_mlp import (
    current_scale,
    fp8_relu_squared_mlp,
    gradient_scale,
    round_weights,
    to_e4m3,
    to_e5m2,
)
from nanogpt.kernels.head_mixing import mix_heads
from nanogpt.models.language_model import Implementations, Windows
from nanogpt.models.record89.model import Record89
from nanogpt.models.record_model import LossInputs
from nanogpt.recipe import load_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs sm_90"
    ),
]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, device="cuda")).bfloat16()


# --- DC correction ---


def mixing_inputs(tokens: int, ends: list[int]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    y, q, k, v, grad = (randn(tokens, 6, 128) for _ in range(5))
    q, k = (torch.nn.functional.rms_norm(x, (128,)) for x in (q, k))
    inputs = [x.requires_grad_() for x in (y, q, k, v, randn(tokens, 6), randn(tokens, 6))]
    return inputs, grad, torch.tensor([0, *ends], dtype=torch.int32, device="cuda")


MIXING_CASES = {
    "one document": (1_040, [1_040]),
    "documents of all lengths": (4_112, [1, 2, 17, 112, 113, 500, 4_112]),
    "not a multiple of a block": (333, [100, 333]),
    "the record's stage 1": (16_384, document_ends(16_384, 896, 63)),
}


@pytest.mark.parametrize("case", MIXING_CASES)
def test_dc_kernels_against_fp64(case):
    inputs, grad, ends = mixing_inputs(*MIXING_CASES[case])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = mix_heads(*exact, ends, window=112, scale=0.1)
    references = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    for name, plain in (("fast", False), ("plain", True)):
        out = mix_heads(*inputs, ends, window=112, scale=0.1, plain=plain)
        found = (out, *torch.autograd.grad(out, inputs, grad))
        errors = [relative_error(a, b) for a, b in zip(found, references, strict=True)]
        print(f"{case}, {name}: out, dy, dq, dk, dv, dw1, dw2 = {', '.join(f'{e:.1e}' for e in errors)}")
        assert all(e < 8e-3 for e in errors), name


def test_dc_gradients_are_the_same_every_time():
    inputs, grad, ends = mixing_inputs(*MIXING_CASES["the record's stage 1"])
    runs = [torch.autograd.grad(mix_heads(*inputs, ends, window=112, scale=0.1), inputs, grad) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


# --- 8-bit MLP ---


@pytest.mark.parametrize("tokens", [16_384, 49_152])
def test_8_bit_mlp_against_its_emulation(tokens):
    torch.manual_seed(0)
    u, up, down = randn(tokens, 768), randn(3_072, 768, scale=0.02), randn(3_072, 768, scale=0.02)
    up_scale, down_scale = current_scale(up), current_scale(down)
    up8, down8 = to_e4m3(up / current_scale(up)), to_e4m3(down.float() / down_scale).mT.contiguous()
    peak = torch.relu(u.float() @ up.float().mT).square().amax()
    weights = (up8, up_scale, down8, down_scale, 1.8 * peak / 448)
    grad = randn(tokens, 768)
    u[0, 0] = 8  # the largest is among those that are compared
    results = []
    for device in ("cuda", "cpu"):
        rows = slice(None) if device == "cuda" else slice(0, 2_048)
        inputs = [x.detach().to(device).requires_grad_() for x in (u[rows], up, down)]
        out, found = fp8_relu_squared_mlp(*inputs, *(x.to(device) for x in weights))
        results.append((out, found, *torch.autograd.grad(out, inputs[:1], grad[rows].to(device))))
    (out, found, du), (emulated_out, emulated_peak, emulated_du) = results
    errors = [relative_error(a[:2_048].cpu(), b) for a, b in ((out, emulated_out), (du, emulated_du))]
    print(f"8-bit MLP, {tokens} tokens: out, du = {errors[0]:.1e}, {errors[1]:.1e}")
    assert max(errors) < 2e-2
    assert 0.8 * peak < found < 1.2 * peak and emulated_peak.item() <= found.item()


@pytest.mark.parametrize("tokens", [16, 208, 4_112, 49_152])
def test_the_up_projection_with_its_square_against_fp64(tokens):
    from nanogpt.kernels.fp8_mlp_triton import quantize, up_squared_and_quantized

    torch.manual_seed(tokens)
    u, up = randn(tokens, 768), randn(3_072, 768, scale=0.02)
    u_scale, up_scale = current_scale(u), current_scale(up)
    u8, up8 = quantize(u, u_scale), to_e4m3(up / up_scale)
    # Some numbers lie halfway between two of e4m3's, where the last bit of a fast division decides: with a largest of
    # 5.5 or 5.75 that is 0.9 % of the bf16 numbers below it, with 5.25 6 %, with most others none.
    nearest = to_e4m3(u.float() / u_scale).float()
    off = (u8.float() - nearest).abs()
    assert (off <= 0.125 * nearest.abs() + 2**-9).all() and (off > 0).double().mean() < 0.07
    rows = slice(max(0, tokens - 4_112), None)
    pre = (u8[rows].double() @ up8.double().mT) * (u_scale.double() * up_scale.double())
    exact = pre.clamp(min=0).square()
    post_scale = (0.5 * exact.max() / 448).float()  # the largest are cut off
    post, post8, peak = up_squared_and_quantized(u8, u_scale, up8, up_scale, post_scale, u.dtype)
    rounded = to_e4m3((exact / post_scale.double()).float())
    errors = [relative_error(post[rows], exact), relative_error(post8[rows].float(), rounded.float())]
    differ = (post8[rows].float() != rounded.float()).double().mean().item()
    print(f"up-projection, {tokens} tokens: post {errors[0]:.1e}, post8 {errors[1]:.1e}, {differ:.2%} differ")
    assert errors[0] < 2.5e-3
    assert errors[1] < 1e-2 and differ < 0.02
    assert peak == post.max() and (post8.float() == 448).any()


@pytest.mark.parametrize("both", [False, True], ids=["one layout", "both layouts"])
def test_weights_are_rounded_as_their_emulation_rounds_them(both):
    torch.manual_seed(0)
    bank = randn(12, 2, 3_072, 768, scale=0.02)
    bank[3, 1] = 0
    bank[5] *= 1e3
    down_scale = bank[:, 1].abs().amax((1, 2)).float().clamp(min=1e-12) / 500  # the largest are cut off
    results = []
    for plain in (False, True):
        e4m3 = {"dtype": torch.float8_e4m3fn, "device": "cuda"}
        out = [torch.zeros(12, *shape, **e4m3) for shape in ((3_072, 768), (768, 3_072), (768, 3_072), (3_072, 768))]
        scales = round_weights(bank, down_scale, *out[:2], tuple(out[2:]) if both else None, plain=plain)
        results.append((scales, out))
    (scales, out), (plain_scales, plain_out) = results
    for a, b in zip(scales, plain_scales, strict=True):
        assert torch.equal(a, b)
    for found, expected in zip(out[: 4 if both else 2], plain_out, strict=False):
        differ = (found.float() != expected.float()).double().mean().item()
        print(f"weights rounded otherwise: {differ:.2%}")  # a fast division's last bit, where a number is halfway
        assert differ < 1e-3 and (found.float() - expected.float()).abs().max() <= 32
        assert found.float().abs().max() == 448
    if both:
        for a, b in ((out[0], out[2]), (out[1], out[3])):
            assert torch.equal(a.view(torch.uint8).mT, b.view(torch.uint8))


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("tokens", [272, 16_384])
def test_the_gradient_before_the_activation_against_fp64(tokens, size):
    from nanogpt.kernels.fp8_mlp_triton import gradient_both_ways

    torch.manual_seed(tokens)
    grad, down = randn(tokens, 768, scale=size), randn(3_072, 768, scale=0.02)
    post = randn(tokens, 3_072).clamp(min=0).square()
    post[0] *= 1e10  # its gradients are cut off
    grad_scale, down_scale = gradient_scale(grad), current_scale(down)
    grad8, down8 = to_e5m2(grad.float() / grad_scale), to_e4m3(down / down_scale)
    rows = slice(1, 4_096)
    exact = 2 * post.double().sqrt() * (grad8.double() @ down8.double().mT) * down_scale.double()  # by grad_scale
    d8, transposed = gradient_both_ways(grad8, down8, down_scale, post)
    rounded = to_e5m2(exact.float())
    error = relative_error(d8[rows].float(), rounded[rows].float())
    differ = (d8.float() != rounded.float()).double().mean().item()
    print(f"gradient, {tokens} tokens of {size}: d8 {error:.1e}, {differ:.2%} differ")
    assert error < 2e-2 and differ < 0.02
    assert torch.equal(transposed.view(torch.uint8), paired(d8))
    assert d8.float().isfinite().all() and (d8[0].float().abs() == 57_344).double().mean() > 0.2


def paired(x: torch.Tensor) -> torch.Tensor:
    """x (T, N), 8-bit, transposed with its rows in the kernels' order: 0, 8, 1, 9, ..., 7, 15 of every 16; as bytes."""
    order = torch.arange(len(x), device=x.device).view(-1, 2, 8).mT.reshape(-1)
    return x.view(torch.uint8)[order].mT


@pytest.mark.parametrize("tokens", [16, 272, 4_112, 16_384])
def test_transposed_copies_are_the_kernels_results(tokens):
    from nanogpt.kernels.fp8_head_triton import paired_transpose, quantize_both_ways
    from nanogpt.kernels.fp8_mlp_triton import gradient_both_ways, quantize, up_squared_and_quantized

    torch.manual_seed(tokens)
    u, grad = randn(tokens, 768), randn(tokens, 768, scale=1e-6)
    up, down = (randn(3_072, 768, scale=0.02) for _ in range(2))
    scales = current_scale(u), gradient_scale(grad), current_scale(up), current_scale(down)
    u_scale, grad_scale, up_scale, down_scale = scales
    up8, down8 = to_e4m3(up / up_scale), to_e4m3(down / down_scale)
    quantized = []
    for x, scale, dtype in ((u, 0.9 * u_scale, torch.float8_e4m3fn), (grad, grad_scale, torch.float8_e5m2)):
        same, transposed = quantize_both_ways(x, scale, dtype, paired=True)
        if dtype == torch.float8_e4m3fn:
            assert torch.equal(same.view(torch.uint8), quantize(x, scale).view(torch.uint8))
        else:  # many bf16 numbers lie halfway between two of e5m2's, where the last bit of a fast division decides
            nearest = to_e5m2(x.float() / scale).float()
            off = (same.float() - nearest).abs()
            assert (off <= 0.25 * nearest.abs() + 2**-16).all() and (off > 0).double().mean() < 0.04
        for found in (transposed, paired_transpose(same)):
            assert torch.equal(found.view(torch.uint8), paired(same))
        quantized.append(same)
    u8, grad8 = quantized

    inputs = (u8, u_scale, up8, up_scale, torch.tensor(1e-2, device="cuda"), u.dtype)
    transposed = torch.empty(3_072, tokens, dtype=up8.dtype, device="cuda")
    one_way, both_ways = up_squared_and_quantized(*inputs), up_squared_and_quantized(*inputs, transposed=transposed)
    for a, b in zip(one_way, both_ways, strict=True):
        assert torch.equal(a.float(), b.float())
    assert torch.equal(transposed.view(torch.uint8), paired(both_ways[1]))
    assert both_ways[1].float().max() == 448
    transposed_alone = torch.empty_like(transposed)
    none, alone, peak = up_squared_and_quantized(*inputs[:-1], None, transposed=transposed_alone)
    assert none is None and peak.bfloat16() == both_ways[2].bfloat16()
    for a, b in ((alone, both_ways[1]), (transposed_alone, transposed)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    post8, post_scale = both_ways[1], inputs[4]
    inputs = (grad8, down8, down_scale)
    same, transposed = gradient_both_ways(*inputs, post8, post_scale)
    assert torch.equal(transposed.view(torch.uint8), paired(same))
    assert transposed.float().isfinite().all() and transposed.float().std() > 0
    expected, _ = gradient_both_ways(*inputs, (post8.float() * post_scale).bfloat16())  # rounded once more
    assert (same.view(torch.uint8) != expected.view(torch.uint8)).double().mean() <= 0.01


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("tokens", [272, 16_384])
@pytest.mark.parametrize("which", ["all", "all, and the square", "all, and the square, input by its bound"])
def test_8_bit_gradients_against_their_emulation_and_fp64(tokens, size, which):
    torch.manual_seed(tokens)
    u, up, down = randn(tokens, 768), randn(3_072, 768, scale=0.02), randn(3_072, 768, scale=0.02)
    grad = randn(tokens, 768, scale=size)
    up_scale, down_scale = current_scale(up), current_scale(down)
    up8, down8_t = to_e4m3(up / up_scale), to_e4m3(down / down_scale)
    transposed8 = up8.mT.contiguous(), down8_t
    post_scale = 1.8 * torch.relu(u.float() @ up.float().mT).square().amax() / 448
    weights = (up8, up_scale, down8_t.mT.contiguous(), down_scale, post_scale)
    inputs = [x.requires_grad_() for x in (u, up, down)]
    in8 = {"transposed8": transposed8, "square8": "square" in which}
    in8["u_scale"] = torch.tensor(2.0**-4, device="cuda") if "bound" in which else None
    results = []
    for options in (in8, in8 | {"plain": True}, {}):
        out, _ = fp8_relu_squared_mlp(*inputs, *weights, **options)
        results.append(torch.autograd.grad(out, inputs, grad))
    fast, plain, bf16 = results
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = torch.relu(exact[0] @ exact[1].mT).square() @ exact[2]
    expected = torch.autograd.grad(reference, exact, grad.double())
    between = [relative_error(a, b) for a, b in zip(fast, plain, strict=True)]
    errors = [relative_error(a, b) for a, b in zip(fast, expected, strict=True)]
    errors16 = [relative_error(a, b) for a, b in zip(bf16, expected, strict=True)]
    print(f"8-bit gradients, {which}, {tokens} tokens of {size}: du, dup, ddown")
    for name, found in (("to fp64", errors), ("plain", between), ("bf16 to fp64", errors16)):
        print(f"  {name}: {', '.join(f'{e:.1e}' for e in found)}")
    assert max(between) < 4e-2  # the plain product is rounded to bf16, which moves some gradients by a step of e5m2
    assert max(errors) < 0.12 and not torch.equal(fast[2], bf16[2])
    for a, b in zip(fast, bf16, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


@pytest.mark.parametrize("settings", [("gradients=all",), ("gradients=all", "square=e4m3", "input_scale=bound")])
def test_the_model_takes_its_scales_to_the_products(settings):
    """PyTorch refuses scales that are not aligned: every layer's goes in as it is kept."""
    sizes = ["model.vocab_size=500", "model.padded_vocab_size=512", "model.bigram_rows=1024", "data.bos=499"]
    spec = load_recipe("record89", [*sizes, *(f"model.mlp_fp8.{setting}" for setting in settings)])
    model = Record89(
        spec.model, dtype=torch.bfloat16, max_tokens=1_024, implementations=Implementations(mlp_precision="fp8")
    ).cuda()
    model.draw_parameters(torch.Generator().manual_seed(0))
    u = randn(64, 768).requires_grad_()
    for layer in range(11):
        out = model.fp8_mlp(layer, u, *model.mlp[layer])
        grads = torch.autograd.grad(out, (u, model.mlp), randn(64, 768))
        assert all(x.isfinite().all() for x in (out, *grads)), layer


# --- prefixes ---


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_prefixes_in_the_kernel(precision, terms):
    torch.manual_seed(terms)
    tokens, width, vocab = 512, 768, 50_304
    x, lm_head = randn(tokens, width), randn(width, vocab, scale=0.1)
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    prefixes = torch.randint(0, vocab, (tokens,), device="cuda")
    prefixes[::3], prefixes[1], prefixes[2] = -1, targets[1], targets[min(4, tokens - 1)]
    weights = torch.tensor([1.0, 0.5, 0.25][:terms], device="cuda")
    constants = {"cap": 23.0, "shift": 5.0, "scale": 7.5, "precision": precision}
    with_prefixes = {"prefixes": prefixes, "prefix_weight": torch.tensor(0.25, device="cuda")}
    inputs = [t.requires_grad_() for t in (x, lm_head)]
    results = []
    for plain in (False, True):
        loss = head_loss(*inputs, targets, weights, **with_prefixes, **constants, plain=plain)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for name, a, b in zip(("loss", "dx", "dW"), *results, strict=True):
        assert relative_error(a, b) < (1e-4 if name == "loss" else 1e-2), name
    without = head_loss(*inputs, targets, weights, **constants)
    assert relative_error(without, results[0][0]) > 1e-2


# --- the model ---


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("bf16", ()),
        ("fp8", ()),
        ("fp8", ("gradients=all",)),
        ("fp8", ("gradients=all", "square=e4m3", "input_scale=bound")),
    ],
)
def test_fast_and_plain_paths_agree_and_the_graph_is_one(precision, settings):
    sizes = ["model.vocab_size=4000", "model.padded_vocab_size=4096", "model.bigram_rows=8192", "data.bos=3999"]
    spec = load_recipe("record89", [*sizes, *(f"model.mlp_fp8.{setting}" for setting in settings)])
    tokens = 4_096
    torch.manual_seed(0)
    stream = torch.randint(0, 4_000, (tokens + 1,))
    ends = torch.tensor([0, *document_ends(tokens, 896, 63)], dtype=torch.int32)
    batch = on_gpu(batch_of(spec.model, stream[:-1], stream[1:], ends, 896))
    weights = torch.tensor([1.0, 0.5, 0.25], device="cuda"), torch.tensor(0.25, device="cuda")
    inputs = LossInputs(Windows(128, 384).at_run_time(), *weights)

    def make(plain: bool) -> Record89:
        implementations = Implementations(mlp_precision=precision, plain_kernels=plain)
        model = Record89(spec.model, dtype=torch.bfloat16, max_tokens=tokens, implementations=implementations)
        model.draw_parameters(torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.mlp[:, 1].copy_(0.5 * model.mlp[:, 0])
            model.mudd_w2.normal_(std=0.02)
            model.mudd_gate_w2.normal_(std=0.02)
            model.bigram_embed.normal_(std=0.02)
        return model.cuda()

    plain = make(True)
    fast = make(False)
    fast.load_state_dict(plain.state_dict())
    prefixes = torch.randint(-4_000, 4_000, (4_096,), device="cuda").clamp(min=-1)
    for model in (plain, fast):
        model.restart()
        model.set_prefixes(prefixes)
    last = copy.deepcopy(fast)
    compiled = torch.compile(last.training_loss, fullgraph=True, dynamic=False)
    losses, grads = [], []
    for model, function in ((plain, plain.training_loss), (fast, fast.training_loss), (last, compiled)):
        loss = function(batch, inputs) / tokens
        loss.backward()
        losses.append(loss.item())
        grads.append(model.mlp.grad)
    print(f"record 89, {precision}: plain, fast, compiled = {losses}")
    assert max(losses) - min(losses) < 5e-3
    errors = [relative_error(grad, grads[0]) for grad in grads[1:]]
    print(f"  MLP gradients to plain: {errors}")
    assert max(errors) < 0.3
