"""On a GPU: the validation loss of a checkpoint, computed again without a compiled graph."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import GPU_SIZES, make_data, tiny_spec, train

from nanogpt.training.evaluation import evaluate_runs

pytestmark = [pytest.mark.gpu, pytest.mark.long, pytest.mark.timeout(900)]


def test_the_recorded_loss_comes_out_again_in_bf16(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", (200_000,), val_tokens=20_000)
    runtime = "runtime={dtype: bf16, compile: 'on', attention: varlen}"
    run = tmp_path / "run"
    train(tiny_spec(*GPU_SIZES, "hardware={gpu: h100, gpus_per_node: 1}", runtime), data, run)
    [on_gpu] = evaluate_runs([run], data_directory=data, device="cuda").runs
    assert on_gpu.recorded is not None and on_gpu.step == 12
    assert on_gpu.mean.value == pytest.approx(on_gpu.recorded, abs=2e-3)
