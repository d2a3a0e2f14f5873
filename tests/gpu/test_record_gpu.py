"""What the record and the log of a run on a GPU say of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import make_data, tiny_spec, train

from nanogpt.runs.record import read_record

pytestmark = pytest.mark.gpu


def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    spec = tiny_spec(
        "hardware={gpu: h100, gpus_per_node: 1}",
        "runtime={dtype: fp32, compile: off, attention: plain, kernels: plain, head_precision: bf16}",
    )
    train(spec, make_data(tmp_path / "data"), tmp_path / "run")
    record = read_record(tmp_path / "run")
    (rank,) = record.hardware.ranks
    assert rank.device == torch.cuda.get_device_name(0)
    assert rank.compute_capability == "{}.{}".format(*torch.cuda.get_device_capability(0))
    assert rank.memory_bytes and rank.memory_bytes > 1 << 30
    assert (record.versions["cuda"], record.versions["torch"]) == (torch.version.cuda, torch.__version__)
    assert record.versions["nccl"] and record.versions["cudnn"]
    assert record.peak_memory_bytes and record.peak_reserved_bytes
    assert 0 < record.peak_memory_bytes <= record.peak_reserved_bytes
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "\npeak memory allocated: " in log
    if shutil.which("nvidia-smi"):
        assert "NVIDIA-SMI" in log.partition("\nstep:0/")[0]
