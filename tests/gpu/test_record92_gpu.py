"""Record 92 on a GPU: its fast, plain and compiled paths against each other, and what is captured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pulls import lists_of
from small_specs import add_gradients_alike, batch_of, on_gpu, relative_error

from nanogpt.cache.graphs import compile_whole
from nanogpt.captured import Captured
from nanogpt.data.micro_batches import MicroBatch
from nanogpt.kernels.bench import document_ends
from nanogpt.kernels.table_rows import Gradients, RowAdam, Signs, entries_of, read_rows, row_adam, sum_rows
from nanogpt.models.language_model import Implementations, LanguageModel, Windows
from nanogpt.models.record_model import LossInputs
from nanogpt.models.stage_loss import StageLoss
from nanogpt.optim.communication import Communicator
from nanogpt.optim.optimizer import build_optimizer
from nanogpt.recipe import load_recipe
from nanogpt.training.build import build_model
from nanogpt.training.micro_step import MicroStep
from nanogpt.training.schedule import Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs sm_90"
    ),
]

TOKENS, VOCABULARY = 4_096, 4_000
GRAD_SCALE = 1 / 8  # a run's; 8-bit gradients of much smaller ones would be zeros
SPEC = load_recipe(
    "record92-quarter-table",
    [
        f"model.vocab_size={VOCABULARY}",
        "model.padded_vocab_size=4096",
        "model.ngram_rows=65536",
        "data.bos=3999",
        "training.end=[]",
        *(f"training.stages.{stage}.candidates=3584" for stage in range(4)),
    ],
)


def make_batch(seed: int, *, candidates: int | None) -> MicroBatch:
    stream = torch.randint(0, VOCABULARY, (TOKENS + 1,), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([0, *document_ends(TOKENS, 896, 63)], dtype=torch.int32)
    loss = StageLoss(token_weights=[1.0, 0.5, 0.25], candidates=candidates)
    return on_gpu(batch_of(SPEC.model, stream[:-1], stream[1:], ends, 896, loss=loss))


def make_model(precision: str, *, plain: bool) -> LanguageModel:
    chosen = Implementations(
        head_precision=precision, mlp_precision=precision, projection_precision=precision, plain_kernels=plain
    )
    model = build_model(SPEC, device="cuda", implementations=chosen)
    with torch.no_grad():
        model.mlp[:, 1].copy_(0.5 * model.mlp[:, 0])
        for name in ("mudd_w2", "mudd_w2g", "mudd_gate_w2"):
            model.get_parameter(name).normal_(std=0.02)
        model.get_parameter("post_lambdas").uniform_(0.75, 1.25)
    prefixes = torch.randint(-VOCABULARY, VOCABULARY, (4_096,), generator=torch.Generator().manual_seed(1))
    model.set_prefixes(prefixes.clamp(min=-1))
    model.restart()
    for table in model.tables.values():
        table.values.normal_(std=0.1)
    return model


def loss_inputs() -> LossInputs:
    weights = torch.tensor([1.0, 0.5, 0.25], device="cuda"), torch.tensor(0.25, device="cuda")
    return LossInputs(Windows(128, 384).at_run_time(), *weights)


def begin_cycle(model: LanguageModel, *batches: MicroBatch) -> None:
    for name, table in model.tables.items():
        rows = [batch.extras[extra].cpu().numpy() for batch in batches for extra in model.table_specs[name].extras]
        table.begin_cycle(lists_of(rows, rows=table.rows), TOKENS * len(batches))


@pytest.fixture
def made_on_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@pytest.mark.usefixtures("made_on_gpu")
def test_rows_of_a_table_of_more_than_31_bits_against_fp64():
    """Read, summed and updated, twice with the same bits: a row of the whole first half's tokens among them."""
    torch.manual_seed(0)
    rows, width, tokens = 3_000_000, 768, 20_001
    read = torch.randint(rows, (2, tokens), dtype=torch.int32)
    read[0, : tokens // 2], read[1, -1] = 7, rows - 1
    touched = torch.unique(read).long()
    place = torch.searchsorted(touched, read.long())
    table = torch.zeros(rows, width, dtype=torch.bfloat16)
    start = (0.1 * torch.randn(len(touched), width)).bfloat16()
    signs = Signs((2 * torch.randint(2, (64, width)) - 1).bfloat16(), torch.randint(64, (2, tokens), dtype=torch.int32))
    factors = signs.vectors[signs.rows.long()].double()  # (2, T, D)
    gradients = Gradients(torch.randn(tokens, width).bfloat16(), signs)
    total = torch.zeros(len(touched), width, dtype=torch.float64)
    total.index_add_(0, place.flatten(), (gradients.tokens.double() * factors).flatten(0, 1))
    owed, moment_before, last_before = torch.tensor([0.8, 0.9]), torch.rand(rows), (torch.arange(rows) % 2).int()
    update = RowAdam(number=2, step_size=0.3, beta2=0.9025, decay=0.02, eps=1e-10, divisor=2.0)

    g = total / update.divisor
    paid = moment_before[touched].double() * owed[last_before[touched].long()]
    moments = update.beta2 * paid + (1 - update.beta2) * g.square().mean(1)
    change = g * (update.step_size / (moments.sqrt() + update.eps))[:, None]
    weights = start.double()
    expected = weights - torch.where(change * weights > 0, change + weights * update.decay, change)

    found = []
    for plain in (True, False, False):
        table[touched] = start
        moment, last = moment_before.clone(), last_before.clone()
        entries = entries_of(touched, read.flatten())
        sums = sum_rows(entries, gradients, torch.float32, plain=plain)
        looked_up = read_rows(table, read, signs, plain=plain)
        row_adam(table, moment, last, owed, touched, entries, gradients, update, plain=plain)
        assert (last[touched] == 2).all() and int((last != last_before).sum()) == int((last_before[touched] != 2).sum())
        found.append((looked_up, sums, table[touched], moment))
        exact = (start.double()[place] * factors).sum(0)
        errors = [
            relative_error(looked_up, exact),
            relative_error(sums, total),
            relative_error(table[touched], expected),
            relative_error(moment[touched], moments),
        ]
        table[touched] = 0
        assert not table.any(), "other rows"
        print(f"{'plain' if plain else 'kernels'}: read, summed, updated, moments to fp64: {errors}")
        assert errors[0] < 1.01 * relative_error(exact.bfloat16(), exact)
        assert errors[2] < 1.01 * relative_error(expected.bfloat16(), expected) + 1e-6
        assert max(errors[1], errors[3]) < 1e-6
    assert torch.equal(found[0][0], found[1][0]), "reading rounds once, as the plain path does"
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True)), "the same every time"


@pytest.mark.long
@pytest.mark.parametrize("candidates", [None, 3_584])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_fast_plain_and_compiled_paths_agree(precision, candidates):
    models = []
    for plain in (True, False, False):
        torch.manual_seed(0)
        models.append(make_model(precision, plain=plain))
    batch, inputs = make_batch(0, candidates=candidates), loss_inputs()
    losses, grads = [], []
    for model, compiled in zip(models, (False, False, True), strict=True):
        begin_cycle(model, batch)
        function = compile_whole(model.training_loss) if compiled else model.training_loss
        losses.append(MicroStep(model, function, grad_scale=GRAD_SCALE)(batch, inputs, stage=0).item() / TOKENS)
        [table] = model.tables.values()
        grads.append((model.mlp.grad, model.qk.grad, model.vo.grad, table.gradient))
    print(f"{precision}, {candidates} candidates: plain, fast, compiled = {losses}")
    assert max(losses) - min(losses) < 5e-3
    errors = [[relative_error(a, b) for a, b in zip(grad, grads[0], strict=True)] for grad in grads[1:]]
    print(f"  gradients of mlp, qk, vo and the table to plain: {errors}")
    assert max(map(max, errors)) < 0.3


@pytest.mark.long
def test_captured_micro_steps_read_the_rows_of_their_cycle():
    """Three cycles of two micro-steps: what is pulled has another size, and lies elsewhere, in each."""
    torch.manual_seed(0)
    captured = make_model("bf16", plain=False)
    [table] = captured.tables.values()
    function = compile_whole(captured.training_loss)
    inputs = loss_inputs()
    found = {}
    for capture in (False, True):
        micro_step = MicroStep(captured, function, grad_scale=GRAD_SCALE, capture=capture)
        results = []
        for cycle in range(3):
            batches = [make_batch(10 * cycle + i, candidates=3_584) for i in range(2)]
            begin_cycle(captured, *batches)
            for parameter in captured.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            losses = [micro_step(batch, inputs, stage=0).item() for batch in batches]
            results.append((losses, captured.mlp.grad.clone(), table.gradient.clone()))
        assert micro_step.failure is None
        assert micro_step.lines() == (["CUDA graphs: 1 micro-steps captured"] if capture else [])
        found[capture] = results
    for (loss, *eager), (other, *replayed) in zip(found[False], found[True], strict=True):
        assert other == pytest.approx(loss, rel=1e-4)
        for a, b in zip(replayed, eager, strict=True):
            assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)], ids=["eager", "compiled"])
def test_updates_and_roundings_that_are_replayed_change_no_bit(compiled: bool):
    """Seven steps, across an event; tables of rows are left out."""
    torch.manual_seed(0)
    models = [make_model("fp8", plain=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    replayed, eager = (
        build_optimizer(SPEC.optimizer, model, model.rows, Communicator(), compiled=compiled, capture=capture)
        for model, capture in zip(models, (True, False), strict=True)
    )
    for model in models:
        model.restart()
    round_weights, settled = Captured(models[0].weights_changed, active=True), models[0].settled_step
    assert settled is not None
    schedule = Schedule(SPEC)
    for step in range(332, 339):
        add_gradients_alike(models[0], models[1], torch.Generator("cuda").manual_seed(step))
        for optimizer in (replayed, eager):
            optimizer.step(schedule.at(step).rates)
        round_weights(settled)
        models[1].weights_changed(step)
    assert replayed.lines() == ["CUDA graphs: updates of banks, 3 captured"] and eager.lines() == []
    assert round_weights.lines("rounding") == ["CUDA graphs: rounding, 1 captured"]
    for kind in ("named_parameters", "named_buffers"):
        for (name, one), (_, other) in zip(*(getattr(model, kind)() for model in models), strict=True):
            assert torch.equal(one.float(), other.float()), name
