"""What a recipe needs of Slurm: nodes, GPUs, CPUs, memory, time, and the sbatch command that asks for it.

`slurm/run.sh` has the values of the 8-GPU recipes in its header, for `sbatch slurm/run.sh RECIPE`; a test holds the
two together. Partition, account and the like are the site's: SBATCH_* variables, or options after `--`.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanogpt.errors import InputError
from nanogpt.gpus import GPU_NAMES, GPU_TYPES
from nanogpt.spec import RunSpec

CPUS_PER_CPU_RANK = 2
MEMORY_PER_CPU_RANK_GB = 4
STOP_SIGNAL = "B:USR1@120"  # to the batch script alone: in the image's step it would kill squashfuse
LOG = "logs/%x-%j.out"

# A start from nothing: staging, compiling (10 minutes), warm-up; then the steps at a speed that no healthy machine
# fails to reach (`GpuType.slow_flops`), forward and backward. 8 x H100 do 400e12 each.
START_MINUTES_CPU, START_MINUTES_GPU = 10, 30
SLOW_FLOPS_CPU = 5e9
ROUND_MINUTES = 10

# An option that the user has set by sbatch's variable is left to it: on the command line it would win.
VARIABLES = {
    "--job-name": "SBATCH_JOB_NAME",
    "--gres": "SBATCH_GRES",
    "--time": "SBATCH_TIMELIMIT",
    "--output": "SBATCH_OUTPUT",
    "--array": "SBATCH_ARRAY_INX",
}


@dataclass(frozen=True)
class JobRequest:
    """The resources of one job."""

    name: str
    nodes: int
    gpu: str  # h100, h200, a100, or cpu
    gpus_per_node: int  # 0 for cpu
    cpus_per_node: int
    memory_gb: int  # of a node
    minutes: int

    @property
    def gres(self) -> str:
        """`gpu:h200:8`; `none` undoes the header's."""
        return f"gpu:{self.gpu}:{self.gpus_per_node}" if self.gpus_per_node else "none"

    def options(self, *, runs: int | None = None) -> dict[str, str]:
        """sbatch's options for `runs` jobs in an array, or a job of its own."""
        options = {
            "--job-name": self.name,
            "--nodes": str(self.nodes),
            "--ntasks-per-node": "1",
            "--gres": self.gres,
            "--cpus-per-task": str(self.cpus_per_node),
            "--mem": f"{self.memory_gb}G",
            "--time": f"{self.minutes // 60:02d}:{self.minutes % 60:02d}:00",
            "--output": LOG,
        }
        if runs is not None:
            options["--array"] = f"0-{runs - 1}"
        return options


def job_request(spec: RunSpec) -> JobRequest:
    """The resources that `spec` needs."""
    hardware = spec.hardware
    ranks, kind = hardware.gpus_per_node, GPU_TYPES.get(hardware.gpu)
    return JobRequest(
        name=spec.name,
        nodes=hardware.nodes,
        gpu=hardware.gpu,
        gpus_per_node=ranks if kind else 0,
        cpus_per_node=ranks * (kind.cpus if kind else CPUS_PER_CPU_RANK),
        memory_gb=ranks * (kind.host_memory_gb if kind else MEMORY_PER_CPU_RANK_GB),
        minutes=_minutes(spec),
    )


def _minutes(spec: RunSpec) -> int:
    model, kind = spec.model, GPU_TYPES.get(spec.hardware.gpu)
    evaluations = len(spec.evaluation.steps(spec.training.total_steps)) + 1
    evaluated = spec.evaluation.tokens * evaluations // 3  # forward only, a third
    flops = model.training_flops(spec.training.total_tokens + evaluated, short=0, long=0)
    start, speed = (START_MINUTES_GPU, kind.slow_flops) if kind else (START_MINUTES_CPU, SLOW_FLOPS_CPU)
    minutes = start + flops / (speed * spec.world_size) / 60
    return ROUND_MINUTES * math.ceil(minutes / ROUND_MINUTES)


def sbatch_command(
    request: JobRequest,
    script: str,
    arguments: Sequence[str],
    *,
    environ: Mapping[str, str],
    runs: int | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """`sbatch OPTIONS script arguments`; `extra` are the user's own options, which win."""
    options = request.options(runs=runs)
    left = [f"{name}={value}" for name, value in options.items() if not environ.get(VARIABLES.get(name, ""))]
    return ["sbatch", *left, *extra, script, *arguments]


def shown(command: Sequence[str]) -> str:
    """The command as a user would type it."""
    return shlex.join(command)


def environment_overrides(environ: Mapping[str, str]) -> list[str]:
    """What GPU_TYPE and NUM_GPUS (GPUs of a node) change of a recipe, as `--set` would.

    Raises:
        InputError: a value that cannot be meant.
    """
    overrides = []
    gpu, count = environ.get("GPU_TYPE", "").strip(), environ.get("NUM_GPUS", "").strip()
    if gpu:
        if gpu.lower() not in GPU_NAMES:
            raise InputError(f"GPU_TYPE: found {gpu!r}, expected one of {', '.join(GPU_NAMES)}; or unset GPU_TYPE")
        overrides.append(f"hardware.gpu={gpu.lower()}")
    if count:
        if not re.fullmatch("[0-9]{1,6}", count):
            raise InputError(f"NUM_GPUS: found {count!r}, expected the GPUs of a node, such as 8; or unset NUM_GPUS")
        overrides.append(f"hardware.gpus_per_node={int(count)}")
    return overrides
