"""What a training step hands to the optimizer: gradients summed over micro-steps and steps, times 1/accumulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_specs import randomize, small_speedrun

from nanogpt.data.shards import header_bytes, train_name, val_name
from nanogpt.data.training_batches import StepRequest, TrainBatches
from nanogpt.launch.world import join_world
from nanogpt.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 60
STAGE = "token_weights: [1, 0.5, 0.25], lr_factor: 1"
OVERRIDES = [
    f"training.stages=[{{steps: 4, batch_tokens: 256, window_blocks: {{short: 1, long: 2}}, {STAGE}}}]",
    f"training.extension={{steps: 4, batch_tokens: 128, window_blocks: {{short: 1, long: 3}}, {STAGE}}}",
    "training.final_window_blocks={short: 1, long: 4}",
    "training.window_block=4",
    "training.max_document_tokens=20",
    "optimizer.tied_head.split_stage=1",
    "optimizer.normuon.momentum={low: 0.85, high: 0.95, warmup_steps: 2, cooldown_steps: 2}",
    "evaluation={every: 4, tokens: 256, micro_batch_tokens: 32, target_loss: null}",
    f"data.bos={BOS}",
    "data.epochs=null",
    "training.warmup=false",
]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    tokens = np.random.default_rng(0).integers(0, BOS, 4000).astype("<u2")
    tokens[::13] = BOS
    for name in (train_name(1), val_name(0)):
        (tmp_path / name).write_bytes(header_bytes(len(tokens)) + tokens.tobytes())
    return tmp_path


def test_gradients_are_summed_over_micro_steps_and_between_adam_steps(shards: Path):
    """Eight micro-steps on one process: each counts an eighth. Adam's gradients wait for the second step."""
    spec = small_speedrun(head_dim=4, overrides=OVERRIDES)
    handed_over = []

    class Recorder:
        """In the optimizer's place; it clears what the optimizer clears, and changes nothing."""

        def expect_rows(self, rows, rates):
            pass

        def step(self, rates):
            handed_over.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
            for name, parameter in trainer.model.named_parameters():
                if rates.adam_step or name in ("attn", "mlp"):
                    parameter.grad = None

    with join_world(spec) as world, Trainer(spec, world, run=None, data_directory=shards) as trainer:
        randomize(trainer.model)
        trainer.optimizer = Recorder()
        steps = [trainer.schedule.at(step) for step in range(2)]
        losses = [trainer.train_step(settings)[0].item() for settings in steps]

        extras = spec.model.batch_extras
        with TrainBatches([shards / train_name(1)], slots=8, bos=BOS, extras=extras) as loader:
            expected, per_step = {n: torch.zeros_like(p) for n, p in trainer.model.named_parameters()}, []
            for settings, loss in zip(steps, losses, strict=True):
                total = torch.zeros(())
                batches = loader.next_step(StepRequest(256, 20))
                assert [len(batch.inputs) for batch in batches] == [32] * 8
                for batch in batches:
                    inputs = trainer.model.loss_inputs(settings.point, torch.device("cpu"))
                    total = total + trainer.model.training_loss(batch, inputs)
                gradients = torch.autograd.grad(total / 8, list(trainer.model.parameters()))
                names = [n for n, _ in trainer.model.named_parameters()]
                per_step.append(dict(zip(names, gradients, strict=True)))
                assert loss == pytest.approx(total.item() / 256, rel=1e-5)
    for name in expected:
        bank = name in ("attn", "mlp")
        torch.testing.assert_close(handed_over[0][name], per_step[0][name], rtol=1e-3, atol=1e-4)
        second = per_step[1][name] if bank else per_step[0][name] + per_step[1][name]
        torch.testing.assert_close(handed_over[1][name], second, rtol=1e-3, atol=1e-4)
