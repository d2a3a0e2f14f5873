"""Attention: the blocked plain version against its definition, backend plumbing, and backend selection."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

from nanogpt.errors import InputError
from nanogpt.kernels import attention_flash
from nanogpt.kernels.attention import BACKENDS, attention, select_attention_backend
from nanogpt.kernels.attention_plain import (
    _attention,
    _attention_backward,
    attention_dense,
    attention_plain,
)

# Document ends, window. T is a multiple of 16; 400 is more than three query blocks of the CPU path.
NUMBERS = torch.tensor(9), torch.tensor(0.2, dtype=torch.float64)  # window and scale
DOCUMENTS = {
    "single tokens, then a long document": ([1, 2, 3, 130, 400], 20),
    "one document fills the batch": ([400], 64),
    "window longer than any document": ([16, 100, 400], 5000),
    "window of the query alone": ([200, 400], 0),
    "boundaries on blocks, padded list": ([128, 256, 384, 400, 400, 400], 33),
    "window longer than a query block": ([390, 400], 200),
}


def make_inputs(tokens: int, heads: int = 3, width: int = 16, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(tokens + width)
    shape = (tokens, heads, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def cumulative(ends: list[int]) -> torch.Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def longest(ends: list[int]) -> int:
    return max(b - a for a, b in zip([0, *ends], ends, strict=False))


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def test_dense_is_the_definition_spelled_out_token_by_token():
    q, k, v, _ = make_inputs(48)
    ends, window, scale = [1, 20, 48], 5, 0.3
    expected = torch.empty_like(q)
    for t in range(48):
        start = max(begin for begin in (0, *ends) if begin <= t)
        seen = range(max(start, t - window), t + 1)
        for h in range(q.shape[1]):
            scores = [scale * float(q[t, h] @ k[s, h]) for s in seen]
            total = sum(math.exp(x) for x in scores)
            expected[t, h] = sum(math.exp(x) / total * v[s, h] for x, s in zip(scores, seen, strict=True))
    torch.testing.assert_close(
        attention_dense(q, k, v, cumulative(ends), window=window, scale=scale), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("case", DOCUMENTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)]
)
def test_plain_equals_dense(case, dtype, tolerance):
    ends, window = DOCUMENTS[case]
    *inputs, grad = make_inputs(400, dtype=dtype)
    inputs = [x.requires_grad_() for x in inputs]
    reference_inputs = [x.detach().double().requires_grad_() for x in inputs]
    cu = cumulative(ends)

    reference = attention_dense(*reference_inputs, cu, window=window, scale=0.3)
    reference_grads = torch.autograd.grad(reference, reference_inputs, grad.double())
    out = attention(*inputs, cu, max_seqlen=longest(ends), window=window, scale=0.3)
    grads = torch.autograd.grad(out, inputs, grad)

    assert out.dtype == dtype
    assert relative_error(out, reference) < tolerance
    for name, got, expected in zip("qkv", grads, reference_grads, strict=True):
        assert got.dtype == dtype
        if window == 0 and name != "v":  # one key: the weights are 1 whatever q and k are
            assert got.double().norm() < tolerance * grad.double().norm()
        else:
            assert relative_error(got, expected) < tolerance, name


def test_queries_do_not_depend_on_what_they_cannot_see():
    q, k, v, _ = make_inputs(400)
    ends, window = [150, 400], 30
    cu = cumulative(ends)
    out = attention_plain(q, k, v, cu, max_seqlen=250, window=window, scale=0.3)
    k[100], v[100] = 1e3, 1e3
    changed = attention_plain(q, k, v, cu, max_seqlen=250, window=window, scale=0.3)
    differs = (out != changed).flatten(1).any(dim=1).nonzero().flatten()
    assert (differs.min().item(), differs.max().item()) == (100, 130)


def test_strided_inputs_and_expanded_gradients():
    """Slices of one projection, as a model passes them, and the gradient of a plain sum."""
    qkv = torch.randn(96, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    cu = cumulative([50, 96])
    results = []
    for function in (
        lambda q, k, v: attention(q, k, v, cu, max_seqlen=50, window=7, scale=0.2),
        lambda q, k, v: attention_dense(q, k, v, cu, window=7, scale=0.2),
    ):
        (grad,) = torch.autograd.grad(function(*qkv.unbind(1)).sum(), qkv)
        results.append(grad)
    torch.testing.assert_close(*results)


def test_custom_operations_are_registered_correctly():
    q, k, v, grad = make_inputs(64, dtype=torch.float32)
    cu = cumulative([10, 64])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_attention, (q.requires_grad_(), k, v, cu, 54, *NUMBERS), test_utils=checks)
    out, lse = _attention(q.detach(), k, v, cu, 54, *NUMBERS)
    arguments = (grad, q.detach(), k, v, out, lse, cu, 54, *NUMBERS)
    torch.library.opcheck(_attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def compiled_once(function):
    """`function` compiled whole, and a list that grows by one at each compilation."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True), graphs


def test_compiles_whole_and_once_for_new_documents():
    def loss(q, k, v, cu):
        return attention(q, k, v, cu, max_seqlen=64, window=9, scale=0.2).square().sum()

    q, k, v, _ = make_inputs(64, dtype=torch.float32)
    q.requires_grad_()
    compiled, graphs = compiled_once(loss)
    for ends in ([10, 64, 64], [1, 2, 64], [64, 64, 64]):
        got = torch.autograd.grad(compiled(q, k, v, cumulative(ends)), q)
        expected = torch.autograd.grad(loss(q, k, v, cumulative(ends)), q)
        torch.testing.assert_close(got, expected)
    assert len(graphs) == 1


def test_windows_and_scales_given_as_tensors_share_a_graph():
    cu = cumulative([10, 64])

    def loss(q, k, v, window, scale):
        return attention(q, k, v, cu, max_seqlen=64, window=window, scale=scale).square().sum()

    q, k, v, _ = make_inputs(64, dtype=torch.float32)
    q.requires_grad_()
    compiled, graphs = compiled_once(loss)
    for window, scale in ((9, 0.2), (30, 0.25), (3, 0.1)):
        numbers = torch.tensor(window), torch.tensor(scale, dtype=torch.float64)
        got = torch.autograd.grad(compiled(q, k, v, *numbers), q)
        torch.testing.assert_close(got, torch.autograd.grad(loss(q, k, v, window, scale), q))
    assert len(graphs) == 1


# --- FlashAttention libraries: the plumbing, with a library made of the plain operations ---


def library_of_plain_operations() -> attention_flash.FlashLibrary:
    def tensors(call):
        return *call[:5], torch.tensor(call.window), torch.tensor(call.scale, dtype=torch.float64)

    def backward(grad, out, lse, call):
        assert grad.is_contiguous()
        q, k, v, *rest = tensors(call)
        dq, dk, dv = _attention_backward(grad, q, k, v, out, lse, *rest)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()

    def forward(call):
        return _attention(*tensors(call))

    return attention_flash.FlashLibrary(forward, backward)


@pytest.fixture
def stand_in_library(monkeypatch):
    for name in attention_flash.LOADERS:
        monkeypatch.setitem(attention_flash.LOADERS, name, library_of_plain_operations)
    attention_flash.flash_library.cache_clear()
    yield
    attention_flash.flash_library.cache_clear()


@pytest.mark.parametrize("backend", attention_flash.LOADERS)
@pytest.mark.usefixtures("stand_in_library")
def test_library_backends_are_differentiable_and_compile_whole(backend):
    cu = cumulative([10, 50, 64])

    def loss(qkv, cu):
        q, k, v = qkv.unbind(1)
        return attention(q, k, v, cu, max_seqlen=40, window=9, scale=0.2, backend=backend).sum()

    qkv = torch.randn(64, 3, 2, 16, requires_grad=True)
    expected = torch.autograd.grad(attention_dense(*qkv.unbind(1), cu, window=9, scale=0.2).sum(), qkv)
    torch.testing.assert_close(torch.autograd.grad(loss(qkv, cu), qkv), expected)
    compiled, graphs = compiled_once(loss)
    torch.testing.assert_close(torch.autograd.grad(compiled(qkv, cu), qkv), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("skipped", ["forward", "backward"])
@pytest.mark.usefixtures("stand_in_library")
def test_a_pass_that_is_skipped_gives_zeros_of_the_same_shapes(skipped):
    q, k, v = (torch.randn(64, 2, width, requires_grad=True) for width in (8, 8, 24))
    grad = torch.randn_like(v)

    def passes():
        out = attention(q, k, v, cumulative([10, 50, 64]), max_seqlen=40, window=9, scale=0.2, backend="fa4")
        return out.detach(), torch.autograd.grad(out, (q, k, v), grad)

    out, grads = passes()
    with attention_flash.skipping(skipped):
        other_out, other_grads = passes()
    assert [x.shape for x in (other_out, *other_grads)] == [x.shape for x in (out, *grads)]
    assert bool(other_out.any()) == (skipped == "backward")
    assert any(bool(x.any()) for x in other_grads) == (skipped == "forward")
    again, grads_again = passes()
    assert torch.equal(again, out) and all(map(torch.equal, grads_again, grads))


@pytest.mark.usefixtures("stand_in_library")
def test_keys_may_be_narrower_than_values():
    cu = cumulative([10, 50, 64])
    narrow, wide = torch.randn(2, 64, 2, 8, dtype=torch.double), torch.randn(64, 2, 24, dtype=torch.double)
    inputs = [x.requires_grad_() for x in (*narrow, wide)]
    grad = torch.randn_like(wide)
    expected = torch.autograd.grad(attention_dense(*inputs, cu, window=9, scale=0.2), inputs, grad)
    out = attention(*inputs, cu, max_seqlen=40, window=9, scale=0.2, backend="fa4")
    for one, other in zip(torch.autograd.grad(out, inputs, grad), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_library_without_such_kernels_gets_zeros_beside_the_keys():
    inner = library_of_plain_operations()

    def forward(call):
        assert call.q.shape == call.k.shape == call.v.shape
        return inner.forward(call)

    def backward(grad, out, lse, call):
        assert call.q.shape == call.k.shape == call.v.shape
        return inner.backward(grad, out, lse, call)

    padded = attention_flash._with_padded_keys(attention_flash.FlashLibrary(forward, backward))
    narrow, wide = torch.randn(2, 64, 2, 8), torch.randn(64, 2, 24)
    call = attention_flash.Call(*narrow, wide, cumulative([10, 64]), 54, 9, 0.2)
    out, lse = padded.forward(call)
    torch.testing.assert_close((out, lse), inner.forward(call))
    grads = padded.backward(wide, out, lse, call)
    torch.testing.assert_close(grads, inner.backward(wide, out, lse, call))
    assert all(grad.is_contiguous() for grad in grads)


class _Received(dict[str, object]):
    """Arguments of the last call of any function of a module that stands in for a library's; `positional` are those."""

    def module(self, name: str, *functions: str) -> ModuleType:
        module = ModuleType(name)
        for function in functions:
            setattr(module, function, self._take)
        return module

    def _take(self, *positional: object, **keywords: object) -> tuple[None, None]:
        self.clear()
        self.update(keywords, positional=positional)
        return None, None


@pytest.mark.parametrize(
    ("backend", "name", "functions"),
    [
        ("fa4", "flash_attn.cute.interface", ("_flash_attn_fwd", "_flash_attn_bwd")),
        ("fa3", "flash_attn_interface", ("_flash_attn_forward", "_flash_attn_backward")),
        ("fa2", "flash_attn.flash_attn_interface", ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")),
    ],
)
def test_libraries_get_the_numbers_and_whether_to_be_deterministic(backend, name, functions, monkeypatch):
    received = _Received()
    for parent in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, received.module(name, *functions))
    library = attention_flash.LOADERS[backend]()
    x = torch.zeros(4, 1, 8)
    call = attention_flash.Call(x, x, x, cumulative([4]), 4, 2, 0.1)
    library.forward(call)
    assert (received["max_seqlen_q"], received["softmax_scale"]) == (4, 0.1)
    assert received.get("window_size_left") == 2 or received["window_size"] == (2, 0)
    try:
        for deterministic in (True, False):
            torch.use_deterministic_algorithms(deterministic)
            library.backward(x, x, x[..., 0].T, call)
            assert received["deterministic"] is deterministic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
@pytest.mark.parametrize("width", [64, 128])
def test_fa4_gets_tiles_that_fit_narrow_keys(capability, width, monkeypatch):
    received = _Received()
    name, tiles = "flash_attn.cute.interface", "_tile_size_bwd_sm90"
    for parent in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    interface = received.module(name, "_flash_attn_fwd", "_flash_attn_bwd", tiles)
    monkeypatch.setitem(sys.modules, name, interface)
    monkeypatch.setattr(attention_flash, "device_capability", lambda device: capability)
    library = attention_flash.LOADERS["fa4"]()
    q, v = torch.zeros(4, 1, width), torch.zeros(4, 1, 128)
    library.forward(attention_flash.Call(q, q, v, cumulative([4]), 4, 2, 0.1))
    fitted = capability == (9, 0) and width == 64
    assert received["tile_mn"] == ((128, 128) if fitted else None)
    assert received["positional"][0].shape[-1] == (64 if fitted else 128)
    getattr(interface, tiles)(width, 128, True, True)
    assert received["positional"][0] == (96 if fitted else width)


def test_pytorchs_own_takes_its_arguments():
    """By its operations' schemas and shapes; a GPU is needed for numbers."""
    library = attention_flash.LOADERS["varlen"]()
    with torch.device("meta"):
        q, k, v = torch.empty(3, 64, 2, 16, dtype=torch.bfloat16)
        cu = torch.empty(4, dtype=torch.int32)
        call = attention_flash.Call(q, k, v, cu, 40, 9, 0.2)
        out, lse = library.forward(call)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 64), torch.float32)
        grads = library.backward(out, out, lse, call)
    assert [(grad.shape, grad.is_contiguous()) for grad in grads] == [(q.shape, True)] * 3


@pytest.mark.usefixtures("stand_in_library")
def test_library_operations_are_registered_correctly():
    q, k, v, grad = make_inputs(64, dtype=torch.float32)
    cu = cumulative([10, 64])
    arguments = (q.requires_grad_(), k, v, cu, 54, *NUMBERS, "fa4")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(attention_flash._flash, arguments, test_utils=checks)
    out, lse = attention_flash._flash(q.detach(), *arguments[1:])
    torch.library.opcheck(
        attention_flash._flash_backward,
        (grad, q.detach(), k, v, out, lse, *arguments[3:]),
        test_utils=("test_schema", "test_faketensor"),
    )


# --- selection ---

H100, A100, L40S, B200, RTX_PRO, T4, CPU = (9, 0), (8, 0), (8, 9), (10, 0), (12, 0), (7, 5), None


def selected(requested, capability, **options):
    return select_attention_backend(requested, capability, **{"head_dim": 128, "dtype": torch.bfloat16} | options)


def installed(*names: str):
    return lambda backend: None if backend in names else f"ModuleNotFoundError: no {backend}"


@pytest.mark.parametrize(
    ("capability", "libraries", "expected"),
    [
        (H100, ("fa4", "fa3", "fa2", "varlen"), "fa4"),
        (H100, ("fa3", "fa2", "varlen"), "fa3"),
        (H100, ("fa2", "varlen"), "varlen"),
        (H100, ("fa2",), "fa2"),
        (H100, (), "plain"),
        (A100, ("fa4", "fa3", "fa2", "varlen"), "varlen"),
        (L40S, ("fa4", "fa3", "fa2", "varlen"), "varlen"),
        (L40S, ("fa4", "fa3", "fa2"), "fa2"),
        (RTX_PRO, ("fa4", "fa3", "fa2", "varlen"), "varlen"),
        (B200, ("fa4", "fa3", "fa2", "varlen"), "fa4"),
        (B200, ("fa3", "varlen"), "varlen"),
        (T4, ("fa4", "fa3", "fa2", "varlen"), "plain"),
        (CPU, ("fa4", "fa3", "fa2", "varlen"), "plain"),
    ],
)
def test_auto_takes_the_fastest_that_runs(capability, libraries, expected):
    choice = selected("auto", capability, import_failure=installed(*libraries))
    assert choice.backend == expected
    assert choice.reason.startswith(expected)


def test_the_reason_names_what_was_passed_over():
    choice = selected("auto", H100, import_failure=installed("varlen"))
    assert "sm_90" in choice.reason
    assert "not fa4: ModuleNotFoundError: no fa4" in choice.reason


def test_auto_needs_half_precision_and_supported_heads():
    everything = installed(*BACKENDS)
    choice = selected("auto", H100, dtype=torch.float32, import_failure=everything)
    assert choice.backend == "plain"
    assert "float32" in choice.reason
    assert selected("auto", H100, head_dim=20, import_failure=everything).backend == "plain"
    wide = {gpu: selected("auto", gpu, head_dim=256, import_failure=everything).backend for gpu in (H100, A100, L40S)}
    assert wide == {H100: "fa4", A100: "varlen", L40S: "plain"}
    assert selected("auto", L40S, head_dim=192, import_failure=everything).backend == "varlen"


def test_an_explicit_backend_is_kept_or_refused():
    everything = installed(*BACKENDS)
    for backend in BACKENDS:
        assert selected(backend, H100, import_failure=everything).backend == backend
    assert selected("plain", CPU, import_failure=installed()).backend == "plain"
    with pytest.raises(InputError, match=r"'fa4' cannot run here: its backward pass is for sm_90"):
        selected("fa4", A100, import_failure=everything)
    with pytest.raises(InputError, match=r"'fa3' cannot run here: ModuleNotFoundError: no fa3; use auto"):
        selected("fa3", H100, import_failure=installed("varlen"))
    with pytest.raises(InputError, match="'fa5' does not exist; use auto or one of fa4, "):
        selected("fa5", H100, import_failure=everything)
    with pytest.raises(InputError, match="'fa5' does not exist"):
        attention(*make_inputs(16)[:3], cumulative([16]), max_seqlen=16, window=4, scale=0.1, backend="fa5")


def test_missing_libraries_are_reported_not_raised():
    """On a machine without FlashAttention the real probe gives the import's message."""
    from nanogpt.kernels.attention import import_failure

    assert import_failure("varlen") is None
    if (why := import_failure("fa4")) is not None:
        assert "flash_attn" in why
