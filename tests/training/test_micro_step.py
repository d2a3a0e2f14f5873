"""A micro-step's loss and gradients, with tables read outside the loss, against autograd through all of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_specs import VOCAB, batch_of, randomize, relative_error, small_record89, small_speedrun

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.models.language_model import Windows
from nanogpt.models.record_model import LossInputs
from nanogpt.recipe import load_recipe
from nanogpt.training.build import build_model
from nanogpt.training.implementations import captures_graphs
from nanogpt.training.micro_step import MicroStep

SPECS = {"speedrun": small_speedrun(), "record89": small_record89()}
INPUTS = LossInputs(Windows(short=4, long=9).at_run_time(), torch.tensor([1.0, 0.5, 0.25]))


def make_batch(seed: int) -> MicroBatch:
    stream = torch.randint(VOCAB, (49,), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([0, 20, 48, 48], dtype=torch.int32)
    return batch_of(SPECS["speedrun"].model, stream[:-1], stream[1:], ends, 28)


@pytest.mark.parametrize("kind", SPECS)
def test_gradients_add_up_as_by_autograd(kind):
    model = build_model(SPECS[kind], device="cpu")
    randomize(model)
    batches = [make_batch(seed) for seed in range(3)]
    expected = [model.training_loss(batch, INPUTS) for batch in batches]
    sum(0.25 * loss for loss in expected).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    micro_step = MicroStep(model, model.training_loss, grad_scale=0.25)
    losses = [micro_step(batch, INPUTS, stage=0) for batch in batches]
    assert not any(loss.requires_grad for loss in losses)
    assert losses == pytest.approx([loss.item() for loss in expected], rel=1e-6)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-5, name


@pytest.mark.parametrize("kind", SPECS)
def test_the_look_ups_are_what_the_model_reads(kind):
    model = build_model(SPECS[kind], device="cpu")
    randomize(model)
    batch = make_batch(0)
    look_ups = model.look_ups(batch)
    embedded = tuple(look_up.read() for look_up in look_ups)
    assert len(look_ups) == 2 + len(SPECS[kind].model.value_embed_layers)
    given, own = (model.training_loss(batch, INPUTS, embedded=e) for e in (embedded, None))
    assert torch.equal(given, own)
    for index in range(len(embedded)):  # each is read, and in its own place
        changed = tuple(e + 1 if i == index else e for i, e in enumerate(embedded))
        assert not torch.equal(model.training_loss(batch, INPUTS, embedded=changed), own), index


def test_tables_get_no_other_gradient(monkeypatch):
    """Autograd would make one as large as the table."""
    model = build_model(SPECS["speedrun"], device="cpu")
    randomize(model)
    micro_step = MicroStep(model, model.training_loss, grad_scale=1.0)
    monkeypatch.setattr("nanogpt.optim.row_table.add_rows", lambda *args, **kwargs: None)
    micro_step(make_batch(0), INPUTS, stage=0)
    for name in ("embed", "bigram_embed", "value_embed"):
        assert not model.get_parameter(name).grad.any(), name
    assert model.mlp.grad.any()


@pytest.mark.parametrize(
    ("recipe", "override", "gigabytes", "expected"),
    [
        ("1xh100", "", 85, True),
        ("record89", "hardware.gpu=h200", 150, True),
        ("1xa100", "", 42, False),
        ("1xh100", "runtime.cuda_graphs=off", 85, False),
        ("1xh100", "runtime.compile=off", 85, False),
        ("1xh100", "runtime.kernels=plain", 85, False),
        ("gpt2", "", 85, False),
    ],
)
def test_what_is_captured(recipe, override, gigabytes, expected, monkeypatch):
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    spec = load_recipe(recipe, [override] if override else [])
    assert captures_graphs(spec, torch.device("cuda", 0)) == expected
    assert not captures_graphs(spec, torch.device("cpu"))
