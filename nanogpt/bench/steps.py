"""Milliseconds per training step, stage by stage, at a recipe's real shapes: `nanogpt bench step`.

Each stage is entered as a run enters it, warmed up until everything is compiled, then timed step by step with device
events (host clock on a CPU). Losses mean nothing here; the data may be made up.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nanogpt.bench.conditions import conditions
from nanogpt.console import human_bytes, markdown_table
from nanogpt.gpus import GPU_TYPES
from nanogpt.launch.world import World
from nanogpt.spec import RunSpec
from nanogpt.training.trainer import Trainer

HOST_GROUPS = 3  # groups of steps that the host is timed in


@dataclass(frozen=True)
class StageTiming:
    """One stage, all times in milliseconds. `utilization` is of the GPU type's dense bf16 peak.

    `host_ms` is what the host takes to give an idle GPU the fastest step, on the slowest rank. Where this comes near
    the step's own time, the GPU waits for the host; unless the step has more kernels than the driver queues, when the
    host waits for the GPU. Both are None on a CPU.
    """

    stage: int
    first_step: int
    batch_tokens: int
    windows: tuple[int, int]
    median_ms: float
    low_ms: float  # 20th percentile
    high_ms: float  # 80th percentile
    tokens_per_second: float
    utilization: float | None
    host_ms: float | None
    data_wait_ms: float  # mean wait for a step's batch, on the rank that waited longest
    peak_memory_bytes: int


def time_stages(trainer: Trainer, *, steps: int, warmup_steps: int) -> Iterator[StageTiming]:
    """Time every stage of the trainer's schedule in order, over `steps` steps after `warmup_steps`."""
    schedule, world = trainer.schedule, trainer.world
    cuda = world.device.type == "cuda"
    for index, first in enumerate(schedule.first_steps):
        length = schedule.stages[index].steps
        if cuda:
            torch.cuda.reset_peak_memory_stats(world.device)
        at = [schedule.at(first + i % length) for i in range(warmup_steps + steps)]
        trainer.enter(at[0])
        for settings in at[:warmup_steps]:
            trainer.train_step(settings)
        waited = trainer.train_batches.wait_seconds
        times = _time_each([functools.partial(trainer.train_step, s) for s in at[warmup_steps:]], world)
        waited = trainer.train_batches.wait_seconds - waited
        # Some parameters are updated every other step: a pair of steps is the unit.
        every = trainer.spec.optimizer.steps_between_updates
        groups = _means(times, every)
        again = [functools.partial(trainer.train_step, s) for s in at[-HOST_GROUPS * every :]]
        median = statistics.median(groups)
        yield StageTiming(
            stage=index,
            first_step=first,
            batch_tokens=at[0].batch_tokens,
            windows=(at[0].windows.short, at[0].windows.long),
            median_ms=median,
            low_ms=float(np.quantile(groups, 0.2)),
            high_ms=float(np.quantile(groups, 0.8)),
            tokens_per_second=at[0].batch_tokens / median * 1000,
            utilization=_utilization(trainer.spec, at[0], median),
            host_ms=max(world.gather(min(_means(_time_host(again, world), every)))) if cuda else None,
            data_wait_ms=max(world.gather(1000 * waited / len(times))),
            peak_memory_bytes=torch.cuda.max_memory_allocated(world.device) if cuda else 0,
        )


def _utilization(spec: RunSpec, settings: Any, milliseconds: float) -> float | None:
    gpu = GPU_TYPES.get(spec.hardware.gpu)
    if gpu is None:
        return None
    windows = settings.windows
    flops = spec.model.training_flops(settings.batch_tokens, short=windows.short, long=windows.long)
    return flops / (milliseconds / 1000) / (gpu.speed.flops * spec.world_size)


def _means(times: list[float], every: int) -> list[float]:
    """Of each `every` in a row."""
    return [sum(times[i : i + every]) / every for i in range(0, len(times) - every + 1, every)]


def _time_each(calls: Sequence[Callable[[], object]], world: World) -> list[float]:
    """Milliseconds of each call on the device.

    On CUDA they are between events, so that the host may run ahead as it does in a run.
    """
    cuda = world.device.type == "cuda"
    events, clock = list[torch.cuda.Event](), list[float]()

    def mark() -> None:
        if cuda:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
        else:
            clock.append(time.perf_counter())

    world.synchronize()
    mark()
    for call in calls:
        call()
        mark()
    world.synchronize()
    if cuda:
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return [1000 * (b - a) for a, b in itertools.pairwise(clock)]


def _time_host(calls: Sequence[Callable[[], object]], world: World) -> list[float]:
    """Milliseconds of each call on the host, once the device has nothing to do."""
    times = []
    for call in calls:
        world.synchronize()
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return times


def as_table(timings: list[StageTiming], trainer: Trainer) -> str:
    """The timings as a Markdown table, below a line for each implementation that was chosen."""
    columns = [
        "stage",
        "tokens a step",
        "windows",
        "ms a step",
        "20-80 %",
        "tokens/s",
        "utilisation",
        "host, ms",
        "data wait, ms",
        "peak memory",
    ]
    rows = [
        (
            f"{t.stage + 1}",
            f"{t.batch_tokens:,}",
            f"{t.windows[0]}, {t.windows[1]}",
            f"{t.median_ms:.1f}",
            f"{t.low_ms:.1f}-{t.high_ms:.1f}",
            f"{t.tokens_per_second:,.0f}",
            "" if t.utilization is None else f"{t.utilization:.0%}",
            "" if t.host_ms is None else f"{t.host_ms:.1f}",
            f"{t.data_wait_ms:.2f}",
            human_bytes(t.peak_memory_bytes),
        )
        for t in timings
    ]
    return "\n".join([*trainer.implementation_lines, "", *markdown_table(columns, rows)])


def as_json(timings: list[StageTiming], trainer: Trainer) -> dict[str, Any]:
    """The timings with what they depend on."""
    return {
        **conditions(trainer.spec, trainer.world),
        "implementations": trainer.implementation_lines,
        "stages": [asdict(timing) for timing in timings],
    }
