"""Record 89's model against its definition in fp64, forward and backward; its 8-bit MLP; its parameters."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from functorch.compile import make_boxed_func
from small_specs import batch_of, randomize, relative_error, small_record89
from tiny_runs import RECORD89
from torch._dynamo.backends.common import aot_autograd

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.models.definitions import start_frequencies, yarn
from nanogpt.models.language_model import Implementations, Windows
from nanogpt.models.record89.definition import DenseRecord89
from nanogpt.models.record89.model import Record89
from nanogpt.models.record_model import LossInputs
from nanogpt.recipe import load_recipe
from nanogpt.spec import RunSpec
from nanogpt.training.build import build_model

pytestmark = pytest.mark.usefixtures("one_thread")

T = 32
SPEC = small_record89()
WEIGHTS, PREFIX_WEIGHT = [1.0, 0.5, 0.2], 0.3
# Ends of the documents, short and long window. Windows that bite, and windows that reach beyond every document.
CASES = {
    "windows inside documents": ([2, 3, 17, 32], 3, 7),
    "windows beyond documents": ([8, 10, 21, 32], 40, 100),
}
# Nothing reads these: the last value gate, the scalars of layers that have no attention or token-dependent ones,
# columns beyond the nets' own, the banks' padding.
UNREAD = {
    "ve_gate_bank": [(4,)],
    "resid_lambdas": [(6, 0), (10, 0), (10, 1)],
    "post_lambdas": [(6, 0), (10, 0), (10, 1)],
    "scalars": [(12,), (13,)],
    "mudd_w2": [(1, slice(5, None))],
    "mudd_b2": [(1, slice(5, None))],
    "mudd_gate_w2": [(0, slice(26, None))],
    "mudd_gate_b2": [(0, slice(26, None))],
    "qk": [(slice(60, None),)],
    "vo": [(slice(20, None),)],
    "mlp": [(11,)],
}


def make_model(
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    implementations: Implementations | None = None,
    spec: RunSpec = SPEC,
) -> Record89:
    model = Record89(spec.model, dtype=dtype, max_tokens=64, implementations=implementations or Implementations())
    model.draw_parameters(torch.Generator().manual_seed(seed))  # the signs
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    model.set_prefixes(torch.randint(-20, 61, (64,), generator=generator).clamp(min=-1))
    return model


def make_batch(ends: list[int], seed: int = 0) -> tuple[MicroBatch, list[int]]:
    """A micro-batch and the number of each token's document."""
    stream = torch.randint(0, 61, (T + 1,), generator=torch.Generator().manual_seed(seed))
    document = [sum(end <= t for end in ends) for t in range(T)]
    cu_seqlens = torch.tensor([0, *ends, T, T], dtype=torch.int32)
    longest = max(b - a for a, b in itertools.pairwise([0, *ends]))
    return batch_of(SPEC.model, stream[:-1], stream[1:].long(), cu_seqlens, longest), document


def dense_of(model: Record89, growths: list[tuple[int, int]]) -> DenseRecord89:
    """The definition with the model's parameters as fp64 leaves; `growths`: the long window's changes so far."""
    frequencies, scale = start_frequencies(4), 0.1
    for old, new in growths:
        frequencies = yarn(frequencies, old, new)
        scale *= 1 + 0.2 * math.log(new / old)
    parameters = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    signs, prefixes = model.bigram_signs.double(), model.prefixes.tolist()
    return DenseRecord89(parameters, signs, prefixes, frequencies, scale, dc_window=5)


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
    targets = batch.targets.tolist()
    assert 0 < sum(dense.prefixes[target] >= 0 for target in targets) < T
    x = dense.hidden(batch.inputs.tolist(), document, short, long)
    expected = dense.training_loss(x, targets, WEIGHTS, PREFIX_WEIGHT)
    expected.backward()

    windows = Windows(short, long)
    loss = model.training_loss(batch, LossInputs(windows, torch.tensor(WEIGHTS), torch.tensor(PREFIX_WEIGHT)))
    loss.backward()
    assert relative_error(loss, expected) < 1e-6
    assert {name for name, _ in model.named_parameters()} == dense.p.keys()
    errors = {name: relative_error(p.grad, dense.p[name].grad) for name, p in model.named_parameters()}
    assert max(errors.values()) < 1e-5, errors

    mean = dense.evaluation_loss(x, targets)
    assert relative_error(model.evaluation_loss(batch, windows), mean) < 1e-6
    logits = 23 * torch.sigmoid((x @ dense.p["lm_head"] + 5) / 7.5)
    assert relative_error(model.next_token_logits(batch, windows), logits[-1, :61]) < 1e-5
    expected = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    assert relative_error(model.token_losses(batch, windows), expected) < 1e-6


def test_every_part_of_a_parameter_counts_but_those_that_nothing_reads():
    ends, short, long = CASES["windows inside documents"]
    model, (batch, _) = make_model(), make_batch(ends)
    weights = torch.tensor(WEIGHTS)
    model.training_loss(batch, LossInputs(Windows(short, long), weights, torch.tensor(PREFIX_WEIGHT))).backward()
    for name, p in model.named_parameters():
        if name in ("embed", "value_embed", "bigram_embed"):  # rows of tokens that are not in the batch
            assert p.grad.any(1).sum() > 20, name
            continue
        read = torch.ones_like(p, dtype=torch.bool)
        for index in UNREAD.get(name, ()):
            assert not p.grad[index].any(), (name, index)
            read[index] = False
        idle = (p.grad == 0) & read
        # W_up rows whose ReLU never opens are idle by chance.
        assert idle.float().mean() < (0.01 if name == "mlp" else 1e-9), name


def test_the_prefix_term_is_off_until_a_table_is_set_and_without_a_weight():
    ends, short, long = CASES["windows inside documents"]
    model, (batch, _) = make_model(), make_batch(ends)
    windows, weights, prefix_weight = Windows(short, long), torch.tensor(WEIGHTS), torch.tensor(PREFIX_WEIGHT)
    with_prefixes = model.training_loss(batch, LossInputs(windows, weights, prefix_weight))
    without = model.training_loss(batch, LossInputs(windows, weights))
    assert with_prefixes > without
    model.restart()
    off = model.training_loss(batch, LossInputs(windows, weights, prefix_weight))
    assert off.item() == pytest.approx(without.item(), rel=1e-12)


def test_a_restart_undoes_the_growth_of_windows():
    ends, short, long = CASES["windows inside documents"]
    model, (batch, _) = make_model(), make_batch(ends)
    before = model.evaluation_loss(batch, Windows(short, long))
    model.change_windows(Windows(16, 48), Windows(32, 80))
    grown = model.evaluation_loss(batch, Windows(short, long))
    model.restart()
    assert model.evaluation_loss(batch, Windows(short, long)) == before != grown


def test_bf16_runs_on_a_cpu_and_stays_near_fp32():
    ends, short, long = CASES["windows inside documents"]
    narrow, wide = make_model(torch.bfloat16), make_model(torch.float32)
    shared = {n: p.float() for n, p in narrow.state_dict().items() if "_extra_state" not in n}
    wide.load_state_dict(shared, strict=False)
    batch, _ = make_batch(ends)
    losses = []
    for model in (narrow, wide):
        loss = model.training_loss(
            batch, LossInputs(Windows(short, long), torch.tensor(WEIGHTS), torch.tensor(PREFIX_WEIGHT))
        )
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert {n for n, p in narrow.named_parameters() if p.dtype == torch.float32} == {
        "scalars",
        "post_lambdas",
        "resid_lambdas",
        "mudd_gate_scale",
    }
    assert narrow.bigram_signs.dtype == torch.bfloat16


# --- the MLPs in 8-bit floats ---

FP8 = Implementations(mlp_precision="fp8")


def test_training_takes_the_8_bit_mlps_and_evaluation_does_not():
    ends, short, long = CASES["windows inside documents"]
    windows, weights = Windows(short, long), torch.tensor(WEIGHTS)
    batch, _ = make_batch(ends)
    wide, narrow = make_model(torch.float32), make_model(torch.float32, implementations=FP8)
    narrow.restart()  # randomize has changed the weights
    assert narrow.evaluation_loss(batch, windows) == wide.evaluation_loss(batch, windows)
    loss, exact = (model.training_loss(batch, LossInputs(windows, weights)) for model in (narrow, wide))
    assert 1e-5 < relative_error(loss, exact) < 0.05
    for model, total in ((narrow, loss), (wide, exact)):
        total.backward()
        assert model.mlp.grad.isfinite().all()
    # The scale of each layer's activation is that of its own largest, for the next call.
    scales = [float(scale) for scale in narrow.fp8_mlp.scales("post_scale")]
    assert len(set(scales)) == 11 and 1.0 not in scales
    assert narrow.training_loss(batch, LossInputs(windows, weights)) != loss


@pytest.mark.parametrize("square", ["bf16", "e4m3"])
def test_8_bit_gradients_change_gradients_alone(square):
    ends, short, long = CASES["windows inside documents"]
    batch, _ = make_batch(ends)
    found = []
    for overrides in ([], ["model.mlp_fp8.gradients=all", f"model.mlp_fp8.square={square}"]):
        model = make_model(torch.float32, implementations=FP8, spec=small_record89(overrides=overrides))
        model.restart()  # randomize has changed the weights
        loss = model.training_loss(batch, LossInputs(Windows(short, long), torch.tensor(WEIGHTS)))
        loss.backward()
        found.append((loss, model.mlp.grad, model.lm_head.grad, model.qk.grad))
    (loss, mlp, head, qk), (loss8, mlp8, head8, qk8) = found
    assert torch.equal(loss, loss8) and torch.equal(head, head8)
    last = SPEC.model.layers - 1
    assert not torch.equal(mlp[last, 1], mlp8[last, 1])
    for layer in range(last + 1):
        assert 1e-3 < relative_error(mlp8[layer, 0], mlp[layer, 0]) < 0.3, layer
        assert relative_error(mlp8[layer, 1], mlp[layer, 1]) < 0.3, layer
    assert 1e-3 < relative_error(qk8, qk) < 0.3


# Of each kind at least one, so that a compiler has less to trace.
FIVE_LAYERS = [setting for setting in RECORD89 if re.match(r"model\.(\w*layers?=|skip=|\w+_bank_padding=)", setting)]


def test_gradients_of_learned_numbers_are_summed_together():
    """A sum of its own is a kernel of one block for each: 62 of them were 1 % of stage 1 on an H100."""
    single = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        sums = [node for node in graph.graph.nodes if node.target == torch.ops.aten.sum.default]
        single.append(len(sums))
        return make_boxed_func(graph.forward)

    ends, short, long = CASES["windows inside documents"]
    batch, _ = make_batch(ends)
    model = make_model(torch.float32, spec=small_record89(overrides=FIVE_LAYERS))
    compiled = torch.compile(model.training_loss, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
    compiled(batch, LossInputs(Windows(short, long), torch.tensor(WEIGHTS))).backward()
    forward, backward = single
    assert forward == 0
    assert 0 < backward <= 4  # the gates' scale for each of its nets, smear and skip


def test_the_8_bit_weights_follow_the_optimizer_and_a_checkpoint():
    ends, short, long = CASES["windows inside documents"]
    batch, _ = make_batch(ends)
    model = make_model(torch.float32, implementations=FP8)
    model.restart()  # randomize has changed the weights
    with torch.no_grad():
        model.mlp.neg_()
    stale = model.training_loss(batch, LossInputs(Windows(short, long), torch.ones(1))).item()
    model.weights_changed(20)
    fresh = model.training_loss(batch, LossInputs(Windows(short, long), torch.ones(1))).item()
    assert stale != fresh
    with torch.no_grad():
        model.mlp.mul_(0.9)
    model.weights_changed(21)
    other = Record89(SPEC.model, dtype=torch.float32, max_tokens=64, implementations=FP8)
    other.load_state_dict(model.state_dict())
    losses = [m.training_loss(batch, LossInputs(Windows(short, long), torch.ones(1))).item() for m in (model, other)]
    assert losses[0] == losses[1] != fresh
    plain = Record89(SPEC.model, dtype=torch.float32, max_tokens=64, implementations=Implementations())
    plain.load_state_dict(model.state_dict())  # a checkpoint does not depend on the precision
    assert plain.evaluation_loss(batch, Windows(short, long)) == model.evaluation_loss(batch, Windows(short, long))


# --- parameters ---


def test_shapes_of_the_full_model():
    spec = load_recipe("record89").model
    with torch.device("meta"):
        model = Record89(spec, dtype=torch.bfloat16, max_tokens=16, implementations=Implementations())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "qk": (64, 256, 768),
        "vo": (24, 768, 768),
        "mlp": (12, 2, 3072, 768),
        "lm_head": (768, 50304),
        "embed": (50304, 768),
        "value_embed": (5 * 50304, 768),
        "bigram_embed": (377280, 768),
        "ve_gate_bank": (5, 6, 12),
        "smear_gate": (1, 12),
        "post_lambdas": (11, 2),
        "resid_lambdas": (11, 2),
        "mudd_w1": (2, 64, 768),
        "mudd_w2": (2, 14, 64),
        "mudd_b2": (2, 14),
        "mudd_gate_w1": (2, 64, 768),
        "mudd_gate_w2": (2, 41, 64),
        "mudd_gate_b2": (2, 41),
        "mudd_gate_scale": (),
        "scalars": (24,),
    }
    assert model.bigram_signs.shape == (8192, 768)
    assert [sum(c.width for c in spec.gate_columns(late=late)) for late in (False, True)] == [26, 41]
    assert spec.dc_window == 112
    assert (spec.mlp_fp8.activation_headroom, spec.mlp_fp8.weight_headroom) == (1.8, 1.12)
    assert spec.mlp_fp8.bootstrap_steps == 16


def test_start_values():
    model = build_model(small_record89(overrides=["model.bigram_signs=512", "runtime.dtype=bf16"]), device="cpu")
    bound = 3**0.5 * 0.5 / 96**0.5
    for matrices in (model.qk[:60], model.vo[:20], model.mlp[:, 0]):
        assert 0.99 * bound < matrices.max() <= 1.01 * bound
        assert matrices.float().std().item() == pytest.approx(0.5 / 96**0.5, rel=0.02)
    assert not model.qk[60:].any() and not model.vo[20:].any() and not model.mlp[:, 1].any()
    for net in (model.mudd_w1, model.mudd_gate_w1):
        assert 0.97 / 96**0.5 < net.max() < 1.01 / 96**0.5
        assert net.float().std().item() == pytest.approx(1 / 288**0.5, rel=0.03)
    assert model.lm_head.float().std().item() == pytest.approx(0.005, rel=0.03)
    assert model.value_embed.float().std().item() == pytest.approx(0.01, rel=0.03)
    assert model.value_embed.abs().max() > 0.03  # normal, not uniform
    assert torch.equal(model.embed, model.lm_head.mT)
    for name in ("bigram_embed", "ve_gate_bank", "smear_gate", "mudd_w2", "mudd_gate_w2"):
        assert not model.get_parameter(name).any(), name
    assert torch.equal(model.scalars, torch.tensor([0.5, 1.0] * 11 + [0.0, -1.5]))
    assert torch.equal(model.post_lambdas, torch.ones(11, 2))
    assert torch.equal(model.resid_lambdas, torch.full((11, 2), 1.1**0.5))
    assert model.resid_lambdas.bfloat16()[0, 0].item() == 1.046875
    # Biases, which are multiplied by 0.1. Stored in bf16: sqrt(1.1) as 10.5.
    assert model.mudd_gate_scale.item() == pytest.approx(0.1)
    into_last = [0.0] * 6 + [20, 20, 10.5, 10, 0, 0.5, 10.5, 10]
    assert model.mudd_b2[0].tolist() == into_last
    assert model.mudd_b2[1].tolist() == [0, -5, *[0.0] * 12]
    early = [0.0] * 12 + [2.5] * 6 + [0, 0.5] * 4
    late = [0.0] * 12 + [2.5] * 6 + [0, 0.5] * 5 + [5] + [10] * 6 + [0] * 6
    assert model.mudd_gate_b2.tolist() == [[*early, *[0.0] * 15], late]
    signs = model.bigram_signs.float()
    assert torch.equal(signs.abs(), torch.ones(512, 96))
    assert signs.mean().abs() < 0.02
    assert (signs.mean(0).abs() < 0.2).all() and (signs.mean(1).abs() < 0.5).all()


def test_start_values_follow_the_seed_alone():
    def state(*overrides):
        model = build_model(small_record89(overrides=overrides), device="cpu")
        return {**dict(model.named_parameters()), "bigram_signs": model.bigram_signs}

    first, again, other = state(), state(), state("training.seed=1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["qk"], other["qk"])
    assert not torch.equal(first["bigram_signs"], other["bigram_signs"])
