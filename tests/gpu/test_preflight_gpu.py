"""Preflight on a real GPU: `pytest tests/gpu/test_preflight_gpu.py -s`; copies between GPUs need two."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import make_data

from nanogpt.cluster.bandwidth import measure_apart
from nanogpt.cluster.gpus import gpu_processes, visible_gpus
from nanogpt.cluster.preflight import preflight
from nanogpt.gpus import GPU_TYPES, same_type
from nanogpt.recipe import load_recipe

pytestmark = pytest.mark.gpu


def gpu_type() -> str:
    """This machine's GPU as recipes call it."""
    name = torch.cuda.get_device_name()
    for kind in GPU_TYPES:
        if same_type(name, kind):
            return kind
    pytest.skip(f"no recipe is for a {name}")


def test_the_driver_tells_what_torch_sees() -> None:
    gpus = visible_gpus(os.environ)
    assert [gpu.name for gpu in gpus] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert all(gpu.memory_mib and gpu.driver for gpu in gpus)
    gpu_processes()


def test_preflight_passes_and_takes_seconds(tmp_path: Path) -> None:
    count = max(size for size in (1, 2, 4, 8) if size <= torch.cuda.device_count())
    shape = f"hardware={{gpu: {gpu_type()}, gpus_per_node: {count}}}"
    small = ("data.epochs=null", "evaluation.tokens=131072", "evaluation.micro_batch_tokens=16384", "checkpoint.keep=1")
    spec = load_recipe("speedrun", [shape, *small])
    data = make_data(tmp_path / "data", val_tokens=140_000, bos=spec.data.bos)
    began = time.monotonic()
    checks = preflight(spec, data, tmp_path / "runs", os.environ)
    seconds = time.monotonic() - began
    print(f"{seconds:.1f} s")
    assert seconds < 20
    assert not [check for check in checks if check.status == "failed"]
    assert {check.name for check in checks} >= {"GPUs", "driver", "GPU memory"}


def test_gpus_copy_to_one_another() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    rates = measure_apart()
    print(rates)
    assert len(rates) == torch.cuda.device_count()
    assert all(5 < rate < 2000 for rate in rates)
