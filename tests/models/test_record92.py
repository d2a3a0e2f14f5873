"""Record 92's model against its definition in fp64, forward and backward; what its parts read; its parameters."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from pulls import lists_of
from small_specs import batch_of, randomize, relative_error, small_record92

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.kernels.fp8_mlp import to_e4m3
from nanogpt.layers.attention import head_attention
from nanogpt.models.definitions import start_frequencies, yarn
from nanogpt.models.language_model import Implementations, LanguageModel, Windows
from nanogpt.models.record92.definition import DenseRecord92
from nanogpt.models.record92.model import Record92
from nanogpt.models.record92.spec import CANDIDATES, NGRAM_TABLE
from nanogpt.models.record_model import LossInputs
from nanogpt.models.stage_loss import StageLoss
from nanogpt.optim.communication import Communicator
from nanogpt.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

T, VOCAB = 32, 64
SPEC = small_record92()
WEIGHTS, PREFIX_WEIGHT = [1.0, 0.5, 0.2], 0.3
# Ends of the documents, short and long window. Windows that bite, and windows that reach beyond every document.
CASES = {
    "windows inside documents": ([2, 3, 17, 32], 3, 7),
    "windows beyond documents": ([8, 10, 21, 32], 40, 100),
}
NARROW = [slot * 6 + pair for slot in range(5) for pair in range(6)]  # rows of `qk` in layers 0, 2, 5, 1, 8
# Nothing reads these: scalars of layers that have no attention or MLP or token-dependent ones, columns beyond the nets'
# own, the banks' padding, the MLP of the layer that has none, the rear of narrow heads.
UNREAD = {
    "resid_lambdas": [(6, 0), (10, 0), (10, 1)],
    "post_lambdas": [(4, 0), (6, 0), (7, 0), (7, 1), (9, 0), (10, 0), (10, 1)],
    "scalars": [(8,), (9,), (12,), (13,), (14,), (15,), (18,), (19,)],
    "mudd_w2": [(1, slice(10, None))],
    "mudd_w2g": [(slice(10, None),)],
    "mudd_b2": [(1, slice(10, None))],
    "mudd_gate_w2": [(1, slice(13, None))],
    "mudd_gate_b2": [(1, slice(13, None))],
    "qk": [(slice(42, None),), (NARROW, slice(8, 16)), (NARROW, slice(24, 32))],
    "vo": [(slice(14, None),)],
    "mlp": [(7,)],
}


def make_model(
    dtype: torch.dtype = torch.float64, seed: int = 0, implementations: Implementations | None = None
) -> Record92:
    model = Record92(SPEC.model, dtype=dtype, max_tokens=64, implementations=implementations or Implementations())
    model.draw_parameters(torch.Generator().manual_seed(seed))  # the signs
    model.make_tables(Communicator(), "cpu")
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    table = model.tables[NGRAM_TABLE].values
    table.copy_(0.8 * torch.randn(table.shape, generator=generator, dtype=torch.float64))
    model.set_prefixes(torch.randint(-20, 61, (VOCAB,), generator=generator).clamp(min=-1))
    return model


def make_batch(ends: list[int], seed: int = 0, loss: StageLoss | None = None) -> tuple[MicroBatch, list[int]]:
    """A micro-batch and the number of each token's document."""
    stream = torch.randint(0, 61, (T + 1,), generator=torch.Generator().manual_seed(seed))
    document = [sum(end <= t for end in ends) for t in range(T)]
    cu_seqlens = torch.tensor([0, *ends, T, T], dtype=torch.int32)
    longest = max(b - a for a, b in itertools.pairwise([0, *ends]))
    return batch_of(SPEC.model, stream[:-1], stream[1:].long(), cu_seqlens, longest, loss=loss), document


def dense_of(model: Record92, growths: list[tuple[Windows, Windows]]) -> DenseRecord92:
    """The definition with the model's parameters as fp64 leaves; `growths`: the windows' changes so far."""
    frequencies = {kind: start_frequencies(4) for kind in ("narrow", "wide")}
    scales = {"narrow": 0.13, "wide": 0.085}
    for before, after in growths:
        for kind, old, new in (("narrow", before.short, after.short), ("wide", before.long, after.long)):
            frequencies[kind] = yarn(frequencies[kind], old, new)
            scales[kind] *= 1 + 0.2 * math.log(new / old)
    parameters = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    parameters["table"] = model.tables[NGRAM_TABLE].values.double().requires_grad_()
    signs, prefixes = model.ngram_signs.double(), model.prefixes.tolist()
    return DenseRecord92(parameters, signs, prefixes, frequencies, scales, narrow_dim=8, half_dim=8)


GROWTHS = [(Windows(8, 48), Windows(24, 80)), (Windows(24, 80), Windows(24, 80)), (Windows(24, 80), Windows(40, 300))]


@pytest.mark.parametrize(
    ("case", "growths", "candidates"),
    [
        ("windows inside documents", [], None),
        ("windows beyond documents", GROWTHS[:1], 40),
        ("windows inside documents", GROWTHS, 50),
    ],
)
def test_losses_and_every_gradient_are_those_of_the_definition(case, growths, candidates):
    ends, short, long = CASES[case]
    loss_spec = StageLoss(token_weights=WEIGHTS, candidates=candidates)
    model, (batch, document) = make_model(seed=len(growths)), make_batch(ends, seed=len(growths), loss=loss_spec)
    for old, new in growths:
        model.change_windows(old, new)
    dense = dense_of(model, growths)
    targets = batch.targets.tolist()
    classes = list(range(VOCAB)) if candidates is None else batch.extras[CANDIDATES].tolist()
    assert len(classes) == (candidates or VOCAB) and set(targets) <= set(classes)
    prefixes = [dense.prefixes[target] for target in targets]
    assert 0 < sum(prefix in classes for prefix in prefixes) < T
    if candidates == 40:  # a term that is dropped as its prefix is not a candidate
        assert any(prefix >= 0 and prefix not in classes for prefix in prefixes)
    x = dense.hidden(batch.inputs.tolist(), document, short, long)
    expected = dense.training_loss(x, targets, WEIGHTS, PREFIX_WEIGHT, classes)
    expected.backward()

    windows, table = Windows(short, long), model.tables[NGRAM_TABLE]
    table.begin_cycle(lists_of([np.arange(table.rows)], rows=table.rows), T)
    embedded = model.look_ups(batch)
    read = tuple(look_up.read() for look_up in embedded)
    loss = model.training_loss(batch, LossInputs(windows, torch.tensor(WEIGHTS), torch.tensor(PREFIX_WEIGHT)), read)
    loss.backward()
    add_read_gradients(embedded, read)
    assert relative_error(loss, expected) < 1e-6
    assert {name for name, _ in model.named_parameters()} | {"table"} == dense.p.keys()
    errors = {name: relative_error(p.grad, dense.p[name].grad) for name, p in model.named_parameters()}
    assert table.gradient is not None
    errors["table"] = relative_error(table.gradient, dense.p["table"].grad)
    assert max(errors.values()) < 1e-5, errors

    mean = dense.evaluation_loss(x, targets)
    assert relative_error(model.evaluation_loss(batch, windows), mean) < 1e-6
    assert relative_error(model.evaluation_loss(batch, windows, read), mean) < 1e-6
    logits = 23 * torch.sigmoid((x @ dense.p["lm_head"] + 5) / 7.5)
    assert relative_error(model.next_token_logits(batch, windows), logits[-1, :61]) < 1e-5
    nats = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    assert relative_error(model.token_losses(batch, windows), nats) < 1e-6


def add_read_gradients(look_ups, read) -> None:
    """What a micro-step does with the gradients of what was read."""
    from nanogpt.optim.row_table import LookUp, add_gradients

    for look_up in look_ups:
        if isinstance(look_up, LookUp) and look_up.parameter.grad is None:
            look_up.parameter.grad = torch.zeros_like(look_up.parameter)
    add_gradients(look_ups, read, plain=True)


def test_every_part_of_a_parameter_counts_but_those_that_nothing_reads():
    ends, short, long = CASES["windows inside documents"]
    model, (batch, _) = make_model(), make_batch(ends)
    look_ups = model.look_ups(batch)
    read = tuple(look_up.read() for look_up in look_ups)
    table = model.tables[NGRAM_TABLE]
    table.begin_cycle(lists_of([np.arange(table.rows)], rows=table.rows), T)
    inputs = LossInputs(Windows(short, long), torch.tensor(WEIGHTS), torch.tensor(PREFIX_WEIGHT))
    model.training_loss(batch, inputs, read).backward()
    add_read_gradients(look_ups, read)
    assert table.gradient is not None and table.gradient.any(1).sum() > 20
    for name, p in model.named_parameters():
        if name in ("embed", "value_embed"):  # rows of tokens that are not in the batch
            assert p.grad.any(1).sum() > 20, name
            continue
        used = torch.ones_like(p, dtype=torch.bool)
        for index in UNREAD.get(name, ()):
            assert not p.grad[index].any(), (name, index)
            used[index] = False
        if name == "vo":  # the rear half of each head of v, and of o's columns, in layers 1 and 8
            for slot in (3, 4):
                v, o = p.grad[2 * slot], p.grad[2 * slot + 1]
                assert not v.view(6, 16, 96)[:, 8:].any() and not o.view(96, 6, 16)[:, :, 8:].any()
                used[2 * slot].view(6, 16, 96)[:, 8:] = False
                used[2 * slot + 1].view(96, 6, 16)[:, :, 8:] = False
        idle = (p.grad == 0) & used
        # W_up rows whose ReLU never opens are idle by chance.
        assert idle.float().mean() < (0.01 if name == "mlp" else 1e-9), name


def test_post_lambdas_are_in_the_mlps_weights():
    """Of 8-bit products too. What such an MLP adds, and its lambda's gradient, are then as near as 8 bits allow."""
    u = torch.nn.functional.rms_norm(torch.randn(T, 96, generator=torch.Generator().manual_seed(0)), (96,))
    model = make_model(torch.float32, implementations=Implementations(mlp_precision="fp8"))
    model.restart()
    post = torch.rand(11, generator=torch.Generator().manual_seed(1)) + 0.5
    for slot, layer in enumerate([*range(11), 8]):
        up, down = model.mlp[slot].detach()
        exact = post[layer] * torch.relu(u @ up.mT).square() @ down
        expected = torch.zeros(11)
        expected[layer] = exact.square().sum() / post[layer]
        for fp8, tolerance in ((False, 1e-5), (True, 0.1)):
            own = post.clone().requires_grad_()
            out = model._mlp(slot, u, model._mlp_weights(own, fp8=fp8), fp8=fp8)
            [found] = torch.autograd.grad(out, own, exact)
            errors = relative_error(out, exact), relative_error(found, expected)
            assert max(errors) < tolerance, (slot, fp8, errors)
            assert torch.equal(found != 0, expected != 0)


def test_a_restart_undoes_the_growth_of_windows():
    ends, short, long = CASES["windows inside documents"]
    model, (batch, _) = make_model(), make_batch(ends)
    before = model.evaluation_loss(batch, Windows(short, long))
    model.change_windows(*GROWTHS[0])
    grown = model.evaluation_loss(batch, Windows(short, long))
    model.restart()
    assert model.evaluation_loss(batch, Windows(short, long)) == before != grown


def test_each_width_follows_its_own_window():
    model = make_model()
    model.change_windows(Windows(128, 384), Windows(384, 384))
    assert model.narrow.attention_scale == pytest.approx(0.158564, abs=1e-6)
    assert model.wide.attention_scale == 0.085
    model.change_windows(Windows(384, 384), Windows(384, 896))
    assert model.narrow.attention_scale == pytest.approx(0.158564, abs=1e-6)
    assert model.wide.attention_scale == pytest.approx(0.099404, abs=1e-6)


def test_parameters_are_the_records():
    rows = {
        row.name: row
        for row in load_recipe("record92", ["hardware.gpu=h100", "hardware.gpus_per_node=8"]).model.parameters()
    }
    shapes = {
        "qk": (48, 256, 768), "vo": (16, 768, 768), "mlp": (12, 2, 2816, 768), "lm_head": (768, 50304),
        "embed": (50304, 768), "value_embed": (4 * 50304, 768), "ve_gate_bank": (3, 6, 12), "post_lambdas": (11, 2),
        "resid_lambdas": (11, 2), "scalars": (24,), "smear_gate": (1, 12), "mudd_w1": (2, 64, 768),
        "mudd_w2": (2, 14, 64), "mudd_b2": (2, 14), "mudd_w2g": (14, 12, 64), "mudd_gate_w1": (2, 64, 768),
        "mudd_gate_w2": (2, 23, 64), "mudd_gate_b2": (2, 23), "mudd_gate_scale": (),
    }  # fmt: skip
    assert {name: row.shape for name, row in rows.items()} == shapes


def test_starts_are_the_records():
    model: LanguageModel = Record92(SPEC.model, dtype=torch.float64, max_tokens=64, implementations=Implementations())
    model.draw_parameters(torch.Generator().manual_seed(3))
    p = {name: value.detach() for name, value in model.named_parameters()}
    bound = math.sqrt(3) * 0.5 / math.sqrt(96)
    assert p["qk"][:42].abs().max() == pytest.approx(bound, rel=1e-2) and not p["qk"][42:].any()
    assert p["mlp"][:, 0].abs().max() == pytest.approx(bound, rel=1e-2) and not p["mlp"][:, 1].any()
    assert torch.equal(p["embed"], p["lm_head"].T)
    into_last = [0.0] * 6 + [20.0, 20.0, 10 * math.sqrt(1.1), 10.0, 0.0, 0.5, 10 * math.sqrt(1.1), 10.0]
    assert p["mudd_b2"][0].tolist() == pytest.approx(into_last)
    assert p["mudd_b2"][1].tolist() == pytest.approx([0.0, -5.0] + [0.0] * 12)
    assert p["mudd_gate_b2"][0].tolist() == pytest.approx([0.0] * 12 + [2.5] * 6 + [0.0] * 3 + [0.5] * 2)
    assert p["mudd_gate_b2"][1].tolist() == pytest.approx([2.5] * 6 + [0.0] * 3 + [0.5] * 3 + [5.0] + [0.0] * 10)
    assert p["scalars"].tolist() == pytest.approx([0.5, 1.0] * 11 + [0.0, -1.5])
    for name in ("smear_gate", "ve_gate_bank", "mudd_w2", "mudd_w2g", "mudd_gate_w2"):
        assert not p[name].any(), name
    model.make_tables(Communicator(), "cpu")
    assert not model.tables[NGRAM_TABLE].values.any()
    assert set(model.ngram_signs.unique().tolist()) == {-1.0, 1.0}


def test_in_8_bits_training_is_close_and_evaluation_the_same():
    """The emulation of the three kinds of 8-bit products: head, MLP, projection."""
    ends, short, long = CASES["windows beyond documents"]
    batch, _ = make_batch(ends, loss=StageLoss(token_weights=WEIGHTS, candidates=48))
    inputs = LossInputs(Windows(short, long), torch.tensor(WEIGHTS), torch.tensor(PREFIX_WEIGHT))
    exact = make_model(torch.float32)
    loss, evaluated = exact.training_loss(batch, inputs), exact.evaluation_loss(batch, Windows(short, long))
    for name in ("head_precision", "mlp_precision", "projection_precision"):
        rounded = make_model(torch.float32, implementations=Implementations(**{name: "fp8"}))
        rounded.restart()
        rounded.set_prefixes(exact.prefixes)
        difference = float((rounded.training_loss(batch, inputs) - loss).detach().abs())
        assert 1e-5 < difference / float(loss.detach()) < 0.02, name
        assert torch.equal(rounded.evaluation_loss(batch, Windows(short, long)), evaluated), name


def test_8_bit_queries_keys_and_values_are_nearly_those_of_bf16(monkeypatch):
    """Of every layer: in pairs, shifted and rotated alike."""
    ends, short, long = CASES["windows beyond documents"]
    batch, _ = make_batch(ends, loss=StageLoss(token_weights=WEIGHTS))
    inputs = LossInputs(Windows(short, long), torch.tensor(WEIGHTS))
    seen = []

    def seen_attention(q, k, v, *rest, **options):
        seen.append((q, k, v))
        return head_attention(q, k, v, *rest, **options)

    monkeypatch.setattr("nanogpt.models.record92.model.head_attention", seen_attention)
    for precision in ("bf16", "fp8"):
        model = make_model(torch.float32, implementations=Implementations(projection_precision=precision))
        model.restart()
        model.training_loss(batch, inputs)
    layers = zip(seen[7:], seen[:7], strict=True)
    errors = [relative_error(*pair) for layer in layers for pair in zip(*layer, strict=True)]
    assert len(errors) == 3 * 7 and min(errors) > 0.01 and max(errors) < 0.25, errors


CHANGES = {
    "restart": lambda model: model.restart(),
    "optimizer step": lambda model: model.weights_changed(40),
    "checkpoint": lambda model: model.load_state_dict(model.state_dict()),
    "first draw": lambda model: model.draw_parameters(torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_8_bit_copies_of_the_projections_follow_their_weights(change):
    """Of each layer, whichever slot it has: the packed rows that its product reads in bf16."""
    model = make_model(torch.float32, implementations=Implementations(projection_precision="fp8"))
    copies = model.fp8_qkv
    CHANGES[change](model)
    weights = model._attention_weights(list(model.scalars.detach()))
    assert sorted(weights) == [0, 1, 2, 3, 5, 8, 10]
    for layer, own in weights.items():
        group, i = copies.places[model.bank_slot[layer]]
        scale = getattr(copies, f"scale_{group}_{i}")
        assert scale == own.qkv.abs().max() / 448
        assert torch.equal(getattr(copies, f"same_{group}")[i].float(), to_e4m3(own.qkv / scale).float())
        assert torch.equal(getattr(copies, f"transposed_{group}")[i].float().mT, to_e4m3(own.qkv / scale).float())


def test_the_heads_8_bit_scales_are_the_records():
    assert Record92.fp8_scales == (100 / 448, 2.0 / 448, 0.75 / 8 / 448, True)
