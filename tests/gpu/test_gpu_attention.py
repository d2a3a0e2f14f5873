"""Every attention backend that is installed, on the GPU, against the definition; and compiled."""

from __future__ import annotations

import pytest
import torch

from nanogpt.kernels.attention import BACKENDS, attention, import_failure, select_attention_backend
from nanogpt.kernels.attention_plain import attention_dense, attention_plain
from nanogpt.kernels.bench import document_ends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Tokens (multiples of 16 only), document ends, window, heads.
CASES = {
    "single tokens": (4_112, [1, 2, 3, 4, 1_500, 4_112], 128, 6),
    "one document fills the batch": (4_112, [4_112], 384, 6),
    "window longer than any document": (4_112, [500, 1_000, 4_096, 4_112], 9_000, 6),
    "padded list, paired heads": (4_112, [2, 700, 3_000, 4_112, *[4_112] * 60], 640, 3),
    "window of one": (4_112, [17, 4_112], 1, 6),
}


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    if request.param != "plain" and (why := import_failure(request.param)) is not None:
        pytest.skip(why)
    return request.param


def make(tokens: int, ends: list[int], heads: int, key: int = 128, value: int = 128):
    torch.manual_seed(tokens + heads)
    widths = (key, key, value, value)
    q, k, v, grad = (torch.randn(tokens, heads, width, device="cuda", dtype=torch.bfloat16) for width in widths)
    q, k = (torch.nn.functional.rms_norm(x, (key,)) for x in (q, k))
    cu_seqlens = torch.tensor([0, *ends], device="cuda", dtype=torch.int32)
    longest = max(b - a for a, b in zip([0, *ends], ends, strict=False))
    return [x.requires_grad_() for x in (q, k, v)], grad, cu_seqlens, longest


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm()).item()


def assert_matches(backend, reference_function, inputs, grad, cu_seqlens, longest, window, record):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = reference_function(*exact)
    reference_grads = torch.autograd.grad(reference, exact, grad.double())
    out = attention(*inputs, cu_seqlens, max_seqlen=longest, window=window, scale=0.1, backend=backend)
    grads = torch.autograd.grad(out, inputs, grad)
    errors = [relative_error(x, y) for x, y in zip((out, *grads), (reference, *reference_grads), strict=True)]
    print(f"relative error {record} {backend}: out, dq, dk, dv = " + ", ".join(f"{e:.1e}" for e in errors))
    assert errors[0] < 5e-3
    assert all(e < 1e-2 for e in errors[1:])


@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(backend, case):
    tokens, ends, window, heads = CASES[case]
    inputs, grad, cu_seqlens, longest = make(tokens, ends, heads)

    def reference(q, k, v):
        return attention_dense(q, k, v, cu_seqlens, window=window, scale=0.1)

    assert_matches(backend, reference, inputs, grad, cu_seqlens, longest, window, case)


@pytest.mark.parametrize(("key", "value"), [(64, 128), (64, 64)])
@pytest.mark.parametrize("case", ["single tokens", "padded list, paired heads"])
def test_keys_may_be_narrow(backend, case, key, value):
    tokens, ends, window, heads = CASES[case]
    inputs, grad, cu_seqlens, longest = make(tokens, ends, heads, key, value)

    def reference(q, k, v):
        return attention_dense(q, k, v, cu_seqlens, window=window, scale=0.1)

    assert_matches(backend, reference, inputs, grad, cu_seqlens, longest, window, f"{case} ({key}, {value})")


@pytest.mark.parametrize(
    ("tokens", "heads", "longest", "window"),
    [(16_384, 6, 2_048, 384), (49_152, 6, 2_048, 1_408), (98_304, 3, 4_096, 640)],
)
def test_matches_at_the_shapes_of_the_record(backend, tokens, heads, longest, window):
    ends = document_ends(tokens, longest, 255)
    inputs, grad, cu_seqlens, longest = make(tokens, ends, heads)

    def reference(q, k, v):
        return attention_plain(q, k, v, cu_seqlens, max_seqlen=longest, window=window, scale=0.1)

    assert_matches(backend, reference, inputs, grad, cu_seqlens, longest, window, f"{tokens} x {heads}")


def test_validation_shape_runs(backend):
    """262,144 tokens, documents uncut, 895 of them listed: more than libraries' small-batch paths."""
    tokens, window = 262_144, 2_560
    ends = document_ends(tokens, tokens, 895)
    inputs, _, cu_seqlens, longest = make(tokens, ends, 6)
    with torch.no_grad():
        out = attention(*inputs, cu_seqlens, max_seqlen=tokens, window=window, scale=0.13, backend=backend)
        expected = attention_plain(
            *(x.float() for x in inputs), cu_seqlens, max_seqlen=longest, window=window, scale=0.13
        )
    assert relative_error(out, expected.double()) < 5e-3


def test_compiles_whole_and_never_again_for_new_documents(backend):
    tokens = 4_096
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def layer(x, weight, cu_seqlens, window, scale):
        q, k, v = (x @ weight.mT).view(tokens, 3, 6, 128).unbind(1)
        q, k = (torch.nn.functional.rms_norm(t, (128,)) for t in (q, k))
        out = attention(q, k, v, cu_seqlens, max_seqlen=2_048, window=window, scale=scale, backend=backend)
        return (out.float() ** 2).mean()

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    weight = (0.1 * torch.randn(3 * 768, 256, device="cuda")).bfloat16().requires_grad_()
    for shift in range(3):
        ends = [end - shift for end in document_ends(tokens, 2_048 - 8, 126)[:-1]] + [tokens]
        ends = sorted(min(max(end, 1), tokens) for end in ends)
        cu_seqlens = torch.tensor([0, *ends], device="cuda", dtype=torch.int32)
        got = torch.autograd.grad(compiled(x, weight, cu_seqlens, 384, 0.1), weight)[0]
        expected = torch.autograd.grad(layer(x, weight, cu_seqlens, 384, 0.1), weight)[0]
        assert relative_error(got, expected.double()) < 2e-2
    assert counter.frame_count == 1


def test_auto_selects_a_library_that_runs_here():
    capability = torch.cuda.get_device_capability()
    choice = select_attention_backend("auto", capability, head_dim=128, dtype=torch.bfloat16)
    print(choice.reason)
    assert choice.backend != "plain" or torch.cuda.get_device_capability()[0] < 8
