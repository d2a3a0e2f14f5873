"""Where a step's time goes on the GPU, kernel by kernel, and how much of it is exposed communication.

`nanogpt bench profile`; on several GPUs every rank profiles itself.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nanogpt.bench.conditions import conditions
from nanogpt.bench.exposed import Exposure, exposure, read_trace
from nanogpt.console import markdown_table
from nanogpt.launch.watchdog import connect
from nanogpt.launch.world import JOIN_TIMEOUT_S, World
from nanogpt.training.trainer import Trainer

# Parts of a step by the names of their kernels; the first match counts. cuBLAS names operand types: q and r are 8 bits.
PARTS = {
    "communication": r"^nccl",
    "attention": r"^(?!triton_).*(flash|fmha)",
    "MLP: up-projection with its activation, and its backward product": r"_relu_squared(_gradient)?_kernel",
    "FP8 matrix products": r"nvjet_sm\d+_[qr]{2}|e4m3|e5m2",
    "bf16 matrix products": r"nvjet|cutlass|gemm|gemv|splitK",
    "head: cross-entropy": r"_cross_entropy_kernel|_logits8_",
    "packed QKV: norm, rotary and back": r"_norm_and_rotate_kernel|_packed_gradient_kernel",
    "FP8: quantizing, transposing": r"quantize|_transpose_gradient_kernel",
    "Polar Express: symmetric products": r"_symmetric_product_kernel",
    "DC correction": r"_mix_heads",
    "tied head: transposes": r"_transposed_add_kernel",
    "embeddings' gradients": r"embedding_dense_backward|_add_(within|across)_blocks_kernel|[Rr]adix_?[Ss]ort",
    "table of rows": r"_read_rows_kernel|_row_adam_kernel|_sum_(rows|blocks)_kernel",
    "compiled elementwise work and reductions": r"^triton_",
    "copies and fills": r"^Mem(cpy|set)|elementwise_kernel|copy_kernel|fill",
}
OTHER_PART = "other"


@dataclass(frozen=True)
class KernelTime:
    """One kernel's share of a step; `calls` and `milliseconds` are per step."""

    name: str
    calls: float
    milliseconds: float


@dataclass(frozen=True)
class StageProfile:
    """A stage's kernels, longest first, and the device time from the first to the last of them, per step."""

    stage: int
    kernels: list[KernelTime]
    span_ms: float
    exposure: Exposure

    @property
    def busy_ms(self) -> float:
        """Milliseconds of a step in which a kernel ran, if none of them overlapped."""
        return sum(kernel.milliseconds for kernel in self.kernels)


def profile_stages(trainer: Trainer, *, warmup_steps: int, traces: Path | None = None) -> Iterator[StageProfile]:
    """Profile one pair of steps (one with Adam's step, one without) of every stage, warmed up.

    traces: where this rank's Chrome traces go (stage-1.rank-0.json, ...); None keeps none.
    """
    schedule = trainer.schedule
    for index, first in enumerate(schedule.first_steps):
        length, steps = schedule.stages[index].steps, trainer.spec.optimizer.steps_between_updates
        at = [schedule.at(first + i % length) for i in range(warmup_steps + steps)]
        trainer.enter(at[0])
        for settings in at[:warmup_steps]:
            trainer.train_step(settings)
        trainer.world.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            wait_for_all(trainer.world, f"stage {index}")
            for settings in at[warmup_steps:]:
                trainer.train_step(settings)
            trainer.world.synchronize()
        with tempfile.TemporaryDirectory() as scratch:
            trace = (traces or Path(scratch)) / f"stage-{index + 1}.rank-{trainer.world.rank}.json"
            profiler.export_chrome_trace(str(trace))
            yield _summarize(index, profiler, steps, exposure(read_trace(trace), steps))


def wait_for_all(world: World, name: str) -> None:
    """Wait until every rank is here, at the place `name`, without the GPU.

    A profiler starts within milliseconds, not equally many on all ranks: the first collective would wait for the last
    rank, and count as exposed.
    """
    if world.size == 1:
        return
    store = connect(JOIN_TIMEOUT_S)
    if store.add(f"profile/{name}", 1) == world.size:
        store.set(f"profile/{name}/all", "")
    store.wait([f"profile/{name}/all"])


def _summarize(stage: int, profiler: profile, steps: int, exposed: Exposure) -> StageProfile:
    events = [e for e in profiler.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels: dict[str, tuple[int, float]] = {}
    for event in events:
        name = short_name(event.name)
        calls, microseconds = kernels.get(name, (0, 0.0))
        kernels[name] = (calls + 1, microseconds + event.time_range.elapsed_us())
    rows = [KernelTime(name, calls / steps, us / steps / 1000) for name, (calls, us) in kernels.items()]
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events) if events else 0
    return StageProfile(stage, sorted(rows, key=lambda row: -row.milliseconds), span / steps / 1000, exposed)


def short_name(kernel: str) -> str:
    """A kernel's name without template arguments and return types, at most 90 characters."""
    name = re.sub(r"^void ", "", kernel)
    name = re.sub(r"<.*", "", name) if not name.startswith(("triton_", "kernel_cutlass")) else name
    return name if len(name) <= 90 else name[:87] + "..."


def part_of(kernel: str) -> str:
    """The part of a step, a key of PARTS or OTHER_PART, that a kernel of this name belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, kernel)), OTHER_PART)


def part_times(stage: StageProfile) -> dict[str, float]:
    """Milliseconds a step of each part of PARTS and of OTHER_PART."""
    times = dict.fromkeys((*PARTS, OTHER_PART), 0.0)
    for kernel in stage.kernels:
        times[part_of(kernel.name)] += kernel.milliseconds
    return times


def parts_table(stages: list[StageProfile]) -> str:
    """Milliseconds a step of each part of PARTS in each stage, as Markdown."""
    head = ("part, ms a step", *(f"stage {stage.stage + 1}" for stage in stages))
    rows = []
    for part in (*PARTS, OTHER_PART):
        times = [part_times(stage)[part] for stage in stages]
        if any(times):
            rows.append((part, *(f"{time:.1f}" for time in times)))
    rows.append(("all kernels", *(f"{stage.busy_ms:.1f}" for stage in stages)))
    return "\n".join((*markdown_table(head, rows), ""))


def as_table(stage: StageProfile, rows: int) -> str:
    """The longest `rows` kernels of a stage as Markdown, below its milliseconds per step."""
    head = f"Stage {stage.stage + 1}: {stage.span_ms:.1f} ms a step, kernels {stage.busy_ms:.1f} ms"
    if stage.exposure.communicating:
        head += f", communication {stage.exposure.communicating:.2f} ms, of which {stage.exposure.exposed:.2f} exposed"
    rest = stage.kernels[rows:]
    others = KernelTime(f"{len(rest)} others", sum(k.calls for k in rest), sum(k.milliseconds for k in rest))
    cells = [
        (k.name, f"{k.calls:g}", f"{k.milliseconds:.2f}", f"{k.milliseconds / stage.span_ms:.1%}")
        for k in (*stage.kernels[:rows], others)
    ]
    return "\n".join([head, "", *markdown_table(("kernel", "calls a step", "ms a step", "share"), cells), ""])


def as_json(stages: list[StageProfile], exposures: Sequence[Sequence[Exposure]], trainer: Trainer) -> dict[str, Any]:
    """Rank 0's kernels in each stage, with what they depend on, and `exposures` of stages by ranks."""
    return {
        **conditions(trainer.spec, trainer.world),
        "implementations": trainer.implementation_lines,
        "stages": [
            {
                "stage": stage.stage,
                "span_ms": stage.span_ms,
                "busy_ms": stage.busy_ms,
                "parts_ms": part_times(stage),
                "kernels": [asdict(kernel) for kernel in stage.kernels],
                "exposure_of_ranks": [asdict(one) for one in ranks],
            }
            for stage, ranks in zip(stages, exposures, strict=True)
        ],
    }
