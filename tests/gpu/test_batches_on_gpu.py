"""Micro-batches on a CUDA device: equal to those on the CPU, without the host ever waiting for the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt.data.micro_batches import MicroBatch
from nanogpt.data.shards import header_bytes, train_name
from nanogpt.data.training_batches import StepRequest, TrainBatches
from nanogpt.data.validation_batches import ValBatches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOS = 50256


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, BOS, 4_000_000).astype("<u2")
    tokens[rng.random(tokens.size) < 1 / 500] = BOS
    path = tmp_path / train_name(1)
    path.write_bytes(header_bytes(tokens.size) + tokens.tobytes())
    return path


def same(a: MicroBatch, b: MicroBatch) -> bool:
    return a.max_seqlen == b.max_seqlen and all(
        x.device.type == "cuda" and x.dtype == y.dtype and torch.equal(x.cpu(), y)
        for x, y in ((a.inputs, b.inputs), (a.targets, b.targets), (a.cu_seqlens, b.cu_seqlens))
    )


@pytest.mark.parametrize("prefetch", [True, False])
def test_training_batches_equal_those_on_the_cpu_while_the_device_is_busy(shard: Path, prefetch: bool) -> None:
    work = torch.randn(4096, 4096, device="cuda")
    got: list[MicroBatch] = []
    sizes = [131_072] * 6 + [262_144] * 4
    with TrainBatches([shard], slots=8, bos=BOS, device="cuda", prefetch=prefetch) as batches:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for size in sizes:
                step = batches.next_step(StepRequest(size, 2048))
                for _ in range(10):  # the copies of several steps queue up behind this
                    work = torch.tanh(work @ work)
                # Read on the current stream, and drop the original, so that its memory is used again.
                got += [MicroBatch(b.inputs + 0, b.targets + 0, b.cu_seqlens + 0, b.max_seqlen) for b in step]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with TrainBatches([shard], slots=8, bos=BOS) as batches:
        expected = [batch for size in sizes for batch in batches.next_step(StepRequest(size, 2048))]
    assert len(got) == len(expected) == 80
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_validation_batches_equal_those_on_the_cpu(shard: Path) -> None:
    place = {"slots": 8, "bos": BOS, "world_size": 2, "rank": 1}
    options = {"tokens": 2_097_152, "micro_batch_tokens": 131_072, **place}
    got = list(ValBatches([shard], device="cuda", **options))
    expected = list(ValBatches([shard], **options))
    assert len(got) == 8
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
