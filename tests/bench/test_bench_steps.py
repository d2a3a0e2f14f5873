"""`nanogpt bench step`: what it times, on a CPU and with a made-up GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import make_data, tiny_spec

from nanogpt.bench import steps
from nanogpt.launch.world import join_world
from nanogpt.training.trainer import Trainer


def test_every_stage_is_timed(tmp_path: Path):
    spec, data = tiny_spec(), make_data(tmp_path / "data")
    with join_world(spec) as world, Trainer(spec, world, run=None, data_directory=data) as trainer:
        timings = list(steps.time_stages(trainer, steps=4, warmup_steps=1))
        table = steps.as_table(timings, trainer).splitlines()
    stages = spec.training.all_stages
    assert [timing.batch_tokens for timing in timings] == [stage.batch_tokens for stage in stages]
    assert all(0 < timing.low_ms <= timing.median_ms <= timing.high_ms for timing in timings)
    assert {(timing.host_ms, timing.utilization) for timing in timings} == {(None, None)}
    assert table[-len(stages)].split("|")[1:3] == [" 1 ", f" {stages[0].batch_tokens:,} "]


def test_the_host_is_timed_apart_from_the_gpu(monkeypatch: pytest.MonkeyPatch):
    """The GPU takes five times as long for a step as the host, which then waits for it: a driver queues so much."""
    now = SimpleNamespace(host=0.0, gpu=0.0)

    class Event:
        def __init__(self, **_: Any):
            self.at = 0.0

        def record(self) -> None:
            self.at = now.gpu

        def elapsed_time(self, later: Event) -> float:
            return 1000 * (later.at - self.at)

    def step(seconds: float) -> None:
        now.host = max(now.host, now.gpu - 4.0)
        now.gpu = max(now.gpu, now.host) + 5 * seconds
        now.host += seconds

    def synchronize() -> None:
        now.host = max(now.host, now.gpu)

    monkeypatch.setattr(steps.torch.cuda, "Event", Event)
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now.host)
    world: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), synchronize=synchronize)
    calls = [partial(step, seconds) for seconds in (1.0, 2.0, 3.0)]
    assert steps._time_each(calls, world) == [5000, 10000, 15000]
    assert now.host == now.gpu == 30
    assert steps._time_host(calls, world) == [1000, 2000, 3000]
