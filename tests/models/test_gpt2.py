"""GPT-2 against a plain formulation that reads each piece of each document by itself, in fp64; its size."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_specs import relative_error

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.models.gpt2.definition import dense_logits
from nanogpt.models.gpt2.model import Gpt2, split_documents
from nanogpt.models.language_model import Implementations, Windows
from nanogpt.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ["model.layers=2", "model.width=24", "model.heads=3", "model.context=10"]
VOCAB = ["model.vocab_size=50", "model.padded_vocab_size=64", "data.bos=49"]
SPEC = load_recipe("gpt2", [*SIZES, *VOCAB]).model
ENDS = [1, 12, 22, 47, 64]  # shorter than, one above, equal to and more than twice the context of 10
WINDOWS = Windows(64, 64)


def make_model(dtype: torch.dtype = torch.float64) -> Gpt2:
    model = Gpt2(SPEC, dtype=dtype, max_tokens=64, implementations=Implementations())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64) + (p.ndim == 1) * 0.5)
    return model


def make_batch() -> MicroBatch:
    stream = torch.randint(0, 50, (65,), generator=torch.Generator().manual_seed(0))
    return MicroBatch(stream[:-1].int(), stream[1:], torch.tensor([0, *ENDS, 64, 64], dtype=torch.int32), 25)


def test_loss_and_every_gradient_are_those_of_the_definition():
    model, batch = make_model(), make_batch()
    p = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    logits = dense_logits(p, batch.inputs.long(), ENDS, context=10, heads=3)
    expected = F.cross_entropy(logits, batch.targets)
    expected.backward()
    loss = model.training_loss(batch, WINDOWS)
    loss.backward()
    assert relative_error(loss, expected) < 1e-12
    for name, value in model.named_parameters():
        # A key's bias moves all scores of a query alike: its gradient is zero up to rounding.
        assert (value.grad - p[name].grad).norm() < 1e-10 * p[name].grad.norm().clamp(min=1e-3), name
    assert relative_error(model.evaluation_loss(batch, WINDOWS), expected) < 1e-12
    assert relative_error(model.next_token_logits(batch, WINDOWS), logits[-1, :50]) < 1e-6
    token_losses = F.cross_entropy(logits, batch.targets, reduction="none")
    assert relative_error(model.token_losses(batch, WINDOWS), token_losses) < 1e-6
    assert model.training_loss_scale(batch) == 1


def test_documents_are_split_at_the_context():
    position, pieces = split_documents(torch.tensor([0, *ENDS, 64, 64], dtype=torch.int32), 64, 10)
    expected, bounds, start = [], [], 0
    for end in ENDS:
        expected += [i % 10 for i in range(end - start)]
        bounds += list(range(start, end, 10))
        start = end
    assert position.tolist() == expected
    assert pieces.dtype == torch.int32
    assert pieces.tolist() == bounds + [64] * (8 + 64 // 10 - len(bounds))


def test_bf16_runs_on_a_cpu_and_stays_near_fp32():
    losses = []
    for dtype in (torch.bfloat16, torch.float64):
        model = make_model(dtype)
        loss = model.training_loss(make_batch(), WINDOWS)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def count(vocab: str) -> int:
    spec = load_recipe("gpt2", [f"model.padded_vocab_size={vocab}"]).model
    with torch.device("meta"):
        return sum(
            p.numel()
            for p in Gpt2(spec, dtype=torch.bfloat16, max_tokens=64, implementations=Implementations()).parameters()
        )


def test_it_has_124_million_parameters():
    assert count("50257") == 124_439_808
    assert count("50304") == 124_439_808 + 47 * 768  # what padding adds


def test_start_values():
    model = make_model(torch.float32)
    model.draw_parameters(torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            residual = name.endswith(("attn_out.weight", "mlp_down.weight"))
            std = 0.02 / math.sqrt(2 * 2) if residual else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
