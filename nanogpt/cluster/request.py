"""What a recipe needs from Slurm: nodes, GPUs, CPUs, memory, time, and the sbatch command that asks for it.

`slurm/run.sh` has the values of the 8-GPU recipes in its header, for `sbatch slurm/run.sh RECIPE`; a test keeps the
two in step. Partition, account and the like are up to the site: SBATCH_* variables, or options after `--`.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from nanogpt.environment import number_of
from nanogpt.errors import InputError
from nanogpt.gpus import GPU_NAMES, GPU_TYPES
from nanogpt.spec import RunSpec

CPUS_PER_CPU_RANK = 2
MEMORY_PER_CPU_RANK_GB = 4
STOP_SIGNAL = "B:USR1@120"  # to the batch script alone: in the image's step it would kill squashfuse
LOG, ARRAY_LOG = "logs/%x-%j.out", "logs/%x-%A_%a.out"
GIVEN = "NANOGPT_GIVEN"  # names of the NANOGPT_* variables that slurm/use_site.sh found set
CPUS = "NANOGPT_CPUS_PER_GPU"  # instead of `GpuType.cpus`
MOST_RUNS = 1000  # of an array

# A cold start: staging, compiling (10 minutes), warm-up; then the steps at a speed that every healthy machine
# reaches (`GpuType.slow_flops`), forward and backward. 8 x H100 do 400e12 each.
START_MINUTES_CPU, START_MINUTES_GPU = 10, 30
SLOW_FLOPS_CPU = 5e9
ROUND_MINUTES = 10
WARM_MINUTES, WARM_MEMORY_GB = 15, 64

# Options that the user set with sbatch's variables are left out: on the command line they would take precedence.
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
    gpu: str  # of GPU_NAMES
    gpus_per_node: int  # 0 for cpu
    cpus_per_node: int
    memory_gb: int  # of a node
    minutes: int

    @property
    def gres(self) -> str:
        """`gpu:h200:8`; `none` undoes the header's."""
        return f"gpu:{self.gpu}:{self.gpus_per_node}" if self.gpus_per_node else "none"

    def options(self, *, runs: str | None = None) -> dict[str, str]:
        """sbatch's options for a single job, or for an array of `runs` (see `array_range`)."""
        options = {
            "--job-name": self.name,
            "--nodes": str(self.nodes),
            "--ntasks-per-node": "1",
            "--gres": self.gres,
            "--cpus-per-task": str(self.cpus_per_node),
            "--mem": f"{self.memory_gb}G",
            "--time": f"{self.minutes // 60:02d}:{self.minutes % 60:02d}:00",
            "--output": LOG if runs is None else ARRAY_LOG,
        }
        if runs is not None:
            options["--array"] = array_range(runs)
        return options


def array_range(runs: str) -> str:
    """`0-9` for `10`, and `0-9%2`, two at a time, for `10%2`. Raises `InputError`."""
    match = re.fullmatch("([0-9]{1,4})(%[1-9][0-9]{0,3})?", runs)
    if match is None or not 1 <= int(match[1]) <= MOST_RUNS:
        raise InputError(
            f"--runs {runs}: expected a number of runs from 1 to {MOST_RUNS}, such as 10; 10%2 for two at a time"
        )
    return f"0-{int(match[1]) - 1}{match[2] or ''}"


def job_request(spec: RunSpec, environ: Mapping[str, str] = MappingProxyType({})) -> JobRequest:
    """The resources that `spec` needs.

    Raises:
        InputError: the number of CPUs per GPU in `environ` is not a number.
    """
    hardware = spec.hardware
    ranks, kind = hardware.gpus_per_node, GPU_TYPES.get(hardware.gpu)
    cpus = number_of(CPUS, kind.cpus, least=1, most=1024, environ=environ) if kind else CPUS_PER_CPU_RANK
    return JobRequest(
        name=spec.name,
        nodes=hardware.nodes,
        gpu=hardware.gpu,
        gpus_per_node=ranks if kind else 0,
        cpus_per_node=ranks * cpus,
        memory_gb=ranks * (kind.host_memory_gb if kind else MEMORY_PER_CPU_RANK_GB),
        minutes=_minutes(spec),
    )


def warm_request(request: JobRequest) -> JobRequest:
    """What `nanogpt warm` needs to compile for runs of `request`: one of their GPUs."""
    cpus, minutes = max(1, request.cpus_per_node // max(1, request.gpus_per_node)), WARM_MINUTES
    return replace(
        request,
        name=f"{request.name}-warm",
        nodes=1,
        gpus_per_node=min(1, request.gpus_per_node),
        cpus_per_node=cpus,
        memory_gb=WARM_MEMORY_GB,
        minutes=minutes,
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
    runs: str | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """`sbatch OPTIONS script arguments`; `extra` are the user's own options, which take precedence.

    Raises:
        InputError: `extra` drops one of the user's settings (see `left_behind`).
    """
    behind = left_behind(environ, extra)
    if behind:
        raise InputError(
            f"--export: drops {', '.join(behind)}, which you have set here, and the job would do something else."
            f" Name them, as in --export=NONE,{','.join(behind)}, or unset them here"
        )
    options = request.options(runs=runs)
    if environ.get(VARIABLES["--array"]) or any(re.match("--array|-a", word) for word in extra):
        options["--output"] = ARRAY_LOG
    left = [f"{name}={value}" for name, value in options.items() if not environ.get(VARIABLES.get(name, ""))]
    return ["sbatch", *left, *extra, script, *arguments]


def left_behind(environ: Mapping[str, str], extra: Sequence[str]) -> list[str]:
    """Those of the user's NANOGPT_* variables (NANOGPT_GIVEN) that the job would not see."""
    exported = environ.get("SBATCH_EXPORT", "ALL")
    for position, word in enumerate(extra):
        if word.startswith("--export="):
            exported = word.partition("=")[2]
        elif word == "--export" and position + 1 < len(extra):
            exported = extra[position + 1]
    names = {part.partition("=")[0] for part in exported.split(",")}
    return [] if "ALL" in names else sorted({*environ.get(GIVEN, "").split()} - names)


def shown(command: Sequence[str]) -> str:
    """The command as a user would type it."""
    return shlex.join(command)


def environment_overrides(environ: Mapping[str, str]) -> list[str]:
    """What GPU_TYPE and NUM_GPUS (GPUs per node) change in a recipe, as `--set` would.

    Raises:
        InputError: an impossible value.
    """
    overrides = []
    gpu, count = environ.get("GPU_TYPE", "").strip(), environ.get("NUM_GPUS", "").strip()
    if gpu:
        if gpu.lower() not in GPU_NAMES:
            raise InputError(f"GPU_TYPE: found {gpu!r}, expected one of {', '.join(GPU_NAMES)}; or unset GPU_TYPE")
        overrides.append(f"hardware.gpu={gpu.lower()}")
    if count:
        if not re.fullmatch("[0-9]{1,6}", count):
            raise InputError(f"NUM_GPUS: found {count!r}, expected the GPUs per node, such as 8; or unset NUM_GPUS")
        overrides.append(f"hardware.gpus_per_node={int(count)}")
    return overrides
