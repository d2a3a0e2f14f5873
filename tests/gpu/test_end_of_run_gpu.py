"""On a GPU: averages and canonical mask at the end of a compiled run in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import GPU_SIZES, averaged_spec, losses, make_text_data, train

from nanogpt.training.evaluation import evaluate_runs

pytestmark = [pytest.mark.gpu, pytest.mark.long, pytest.mark.timeout(900)]


def test_a_compiled_run_ends_as_it_is_evaluated_anew(tmp_path: Path) -> None:
    data = make_text_data(tmp_path / "data")
    runtime = "runtime={dtype: bf16, compile: 'on', attention: varlen, mlp_precision: bf16}"
    sizes = [setting for setting in GPU_SIZES if setting.startswith("model.")]
    spec = averaged_spec(
        *sizes,
        "hardware={gpu: h100, gpus_per_node: 1}",
        runtime,
        "training.warmup=true",
        "checkpoint={at_end: true}",
    )
    assert train(spec, data, tmp_path / "run").late_graphs == 0
    [on_gpu] = evaluate_runs([tmp_path / "run"], data_directory=data, device="cuda").runs
    assert on_gpu.masked and on_gpu.step == 12
    assert on_gpu.mean.value == pytest.approx(on_gpu.recorded, abs=2e-3)
    training = spec.training.model_copy(update={"end": spec.training.end[:1]})
    train(spec.model_copy(update={"training": training}), data, tmp_path / "unmasked")
    assert losses(tmp_path / "run")[1][12] < losses(tmp_path / "unmasked")[1][12] - 0.01
    assert torch.cuda.max_memory_allocated() > 316_311_552
