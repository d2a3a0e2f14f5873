"""The speedrun's model against its definition in fp64, forward and backward, and its bf16 path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small_specs import BIGRAM_ROWS, VOCAB, batch_of, randomize, relative_error, small_speedrun

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.models.definitions import start_frequencies, yarn
from nanogpt.models.language_model import Implementations, Windows
from nanogpt.models.record_model import LossInputs
from nanogpt.models.speedrun.definition import DenseSpeedrun
from nanogpt.models.speedrun.model import Speedrun
from nanogpt.recipe import load_recipe
from nanogpt.training.build import build_model

pytestmark = pytest.mark.usefixtures("one_thread")

T = 32
SPEC = small_speedrun()
WEIGHTS = [1.0, 0.5, 0.2]
# Ends of the documents, short and long window. Windows that bite, and windows that reach beyond every document.
CASES = {
    "windows inside documents": ([2, 3, 17, 32], 3, 7),
    "windows beyond documents": ([8, 10, 21, 32], 40, 100),
}


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> Speedrun:
    model = Speedrun(SPEC.model, dtype=dtype, max_tokens=64, implementations=Implementations())
    randomize(model, seed)
    return model


def make_batch(ends: list[int], seed: int = 0) -> tuple[MicroBatch, list[int]]:
    """A micro-batch and the number of each token's document."""
    stream = torch.randint(0, 61, (T + 1,), generator=torch.Generator().manual_seed(seed))
    document = [sum(end <= t for end in ends) for t in range(T)]
    cu_seqlens = torch.tensor([0, *ends, T, T], dtype=torch.int32)
    longest = max(b - a for a, b in itertools.pairwise([0, *ends]))
    return batch_of(SPEC.model, stream[:-1], stream[1:].long(), cu_seqlens, longest), document


def dense_of(model: Speedrun, growths: list[tuple[int, int]]) -> DenseSpeedrun:
    """The definition with the model's parameters as fp64 leaves; `growths`: the long window's changes so far."""
    frequencies, scale = start_frequencies(4), 0.1
    for old, new in growths:
        frequencies = yarn(frequencies, old, new)
        scale *= 1 + 0.2 * math.log(new / old)
    parameters = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    return DenseSpeedrun(parameters, frequencies, scale)


@pytest.mark.parametrize(
    ("case", "growths"),
    [
        ("windows inside documents", []),
        ("windows beyond documents", [(48, 80)]),
        ("windows inside documents", [(48, 80), (80, 300)]),
    ],
)
def test_losses_and_every_gradient_are_those_of_the_definition(case, growths):
    ends, short, long = CASES[case]
    model, (batch, document) = make_model(seed=len(growths)), make_batch(ends, seed=len(growths))
    for old, new in growths:
        model.change_windows(Windows(16, old), Windows(16, new))
    dense = dense_of(model, growths)
    x = dense.hidden(batch.inputs.tolist(), document, short, long)
    expected = dense.training_loss(x, batch.targets.tolist(), WEIGHTS)
    expected.backward()

    windows = Windows(short, long)
    loss = model.training_loss(batch, LossInputs(windows, torch.tensor(WEIGHTS)))
    loss.backward()
    assert relative_error(loss, expected) < 1e-6
    assert {name for name, _ in model.named_parameters()} == dense.p.keys()
    errors = {name: relative_error(p.grad, dense.p[name].grad) for name, p in model.named_parameters()}
    assert max(errors.values()) < 1e-5, errors
    idle = {name for name, p in dense.p.items() if not p.grad.any()}
    assert not idle, "these would prove nothing"

    mean = dense.evaluation_loss(x, batch.targets.tolist())
    assert relative_error(model.evaluation_loss(batch, windows), mean) < 1e-6
    logits = 23 * torch.sigmoid((x @ dense.p["lm_head"] + 5) / 7.5)
    assert relative_error(model.next_token_logits(batch, windows), logits[-1, :61]) < 1e-5
    expected = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    assert relative_error(model.token_losses(batch, windows), expected) < 1e-6


def test_no_yarn_step_where_the_long_window_stays(monkeypatch):
    model, steps = make_model(), []
    monkeypatch.setattr(model.rotary, "extend_window", lambda old, new: steps.append((old, new)))
    model.change_windows(Windows(16, 48), Windows(32, 48))
    model.change_windows(Windows(32, 48), Windows(32, 80))
    assert steps == [(48, 80)]


def test_a_restart_undoes_the_growth_of_windows():
    ends, short, long = CASES["windows inside documents"]
    model, (batch, _) = make_model(), make_batch(ends)
    before = model.evaluation_loss(batch, Windows(short, long))
    model.change_windows(Windows(16, 48), Windows(32, 80))
    grown = model.evaluation_loss(batch, Windows(short, long))
    model.restart()
    assert model.evaluation_loss(batch, Windows(short, long)) == before != grown


def test_the_loss_for_the_log_is_per_token():
    batch, _ = make_batch([T])
    assert make_model().training_loss_scale(batch) == T


def test_bf16_runs_on_a_cpu_and_stays_near_fp32():
    ends, short, long = CASES["windows inside documents"]
    narrow, wide = make_model(torch.bfloat16), make_model(torch.float32)
    wide.load_state_dict({n: p.float() for n, p in narrow.state_dict().items() if "rotary" not in n}, strict=False)
    batch, _ = make_batch(ends)
    windows, weights = Windows(short, long), torch.tensor(WEIGHTS)
    losses = []
    for model in (narrow, wide):
        loss = model.training_loss(batch, LossInputs(windows, weights))
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    for name in ("attn", "lm_head", "value_embed"):
        assert relative_error(narrow.get_parameter(name).grad, wide.get_parameter(name).grad) < 0.2, name
    assert {n for n, p in narrow.named_parameters() if p.dtype == torch.float32} == {"scalars", "x0_lambdas"}
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16, torch.float32}


def test_bf16_rounds_the_logits_and_nothing_after_them():
    ends, short, long = CASES["windows inside documents"]
    model, (batch, _) = make_model(torch.bfloat16), make_batch(ends)
    windows = Windows(short, long)
    with torch.no_grad():
        x = model(batch, windows)
        assert x.dtype == torch.bfloat16
        logits = (x.double() @ model.lm_head.double()).to(torch.bfloat16)
    z = 23 * torch.sigmoid((logits.double() + 5) / 7.5)
    expected = torch.nn.functional.cross_entropy(z, batch.targets)
    assert model.evaluation_loss(batch, windows).item() == pytest.approx(expected.item(), rel=1e-5)
    loss = model.training_loss(batch, LossInputs(windows, torch.ones(1)))
    assert loss.item() == pytest.approx(T * expected.item(), rel=1e-5)


# --- parameters ---


def test_shapes_and_dtypes_of_the_full_model():
    spec = load_recipe("speedrun").model
    with torch.device("meta"):
        model = Speedrun(spec, dtype=torch.bfloat16, max_tokens=16, implementations=Implementations())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "attn": (10, 3072, 768),
        "mlp": (12, 2, 3072, 768),
        "lm_head": (768, 50304),
        "embed": (50304, 768),
        "value_embed": (5 * 50304, 768),
        "bigram_embed": (251520, 768),
        "attn_gate_bank": (10, 6, 12),
        "ve_gate_bank": (5, 6, 12),
        "smear_gate": (1, 12),
        "skip_gate": (1, 12),
        "x0_lambdas": (11,),
        "scalars": (47,),
    }


def test_start_values():
    model = build_model(SPEC, device="cpu")
    bound = 3**0.5 * 0.5 / 96**0.5
    for matrices in (model.attn, model.mlp[:, 0]):
        assert 0.99 * bound < matrices.max() <= bound
        assert -bound <= matrices.min() < -0.99 * bound
        assert matrices.std().item() == pytest.approx(0.5 / 96**0.5, rel=0.02)
        assert matrices.mean().abs() < 0.01 * bound
    assert model.lm_head.std().item() == pytest.approx(0.005, rel=0.03)
    assert model.lm_head.abs().max() > 3 * 0.005  # normal, not uniform
    assert torch.equal(model.embed, model.lm_head.mT)
    zeros = ("value_embed", "bigram_embed", "attn_gate_bank", "ve_gate_bank", "smear_gate", "skip_gate", "x0_lambdas")
    for name in zeros:
        assert not model.get_parameter(name).any(), name
    assert not model.mlp[:, 1].any()
    scalars = [1.1] * 11 + [0.5, 1.0] * 11 + [0.1] * 11 + [0.0, 0.5, -1.5]
    assert torch.equal(model.scalars, torch.tensor(scalars))


def test_start_values_follow_the_seed_alone():
    def parameters(*overrides):
        return list(build_model(small_speedrun(overrides=overrides), device="cpu").parameters())

    first, again, other = parameters(), parameters(), parameters("training.seed=1")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    narrow = parameters("runtime.dtype=bf16")
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(first, narrow, strict=True))


def test_the_tables_cover_the_longest_micro_batch():
    model = build_model(small_speedrun(overrides=["evaluation.micro_batch_tokens=32768"]), device="cpu")
    assert model.rotary.cos.shape == (2 * 49152, 8)  # stage 3: 393,216 tokens in 8 slots
    model = build_model(small_speedrun(overrides=["evaluation.micro_batch_tokens=65536"]), device="cpu")
    assert model.rotary.cos.shape == (2 * 65536, 8)


def test_small_tables_have_the_sizes_that_the_definition_assumes():
    model = make_model()
    assert model.bigram_embed.shape[0] == BIGRAM_ROWS
    assert model.embed.shape == (VOCAB, 96)
