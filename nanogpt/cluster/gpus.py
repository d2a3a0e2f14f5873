"""The GPUs of this machine as nvidia-smi tells of them: no CUDA context, no torch, a fraction of a second."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanogpt.errors import RunError
from nanogpt.gpus import OLDEST_DRIVER

GPU_FIELDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.used")
APP_FIELDS = ("gpu_uuid", "pid", "process_name", "used_memory")
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in MiB; None where nvidia-smi does not tell, as of a GPU that is cut into MIG instances."""

    index: int
    uuid: str
    name: str
    driver: str
    memory_mib: int | None
    used_mib: int | None


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU. `used_mib` None: not told."""

    gpu_uuid: str
    pid: int
    name: str
    used_mib: int | None


def visible_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that are this job's: all that nvidia-smi shows, or of them those in CUDA_VISIBLE_DEVICES.

    Raises:
        RunError: there is no nvidia-smi, or it fails.
    """
    gpus = parse_gpus(_nvidia_smi(f"--query-gpu={','.join(GPU_FIELDS)}"))
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible or len(visible) >= len(gpus):
        return gpus  # where Slurm confines devices, nvidia-smi counts the job's own from 0, as CUDA does
    return [gpu for gpu in gpus if str(gpu.index) in visible or any(gpu.uuid.startswith(name) for name in visible)]


def gpu_processes() -> list[GpuProcess]:
    """The processes on all GPUs that can be seen. Raises `RunError` as `visible_gpus` does."""
    return parse_processes(_nvidia_smi(f"--query-compute-apps={','.join(APP_FIELDS)}"))


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs of `--query-gpu` of GPU_FIELDS as CSV without header and units."""
    return [
        Gpu(int(index), uuid, name, driver, _number(total), _number(used))
        for index, uuid, name, driver, total, used in _rows(text, len(GPU_FIELDS))
    ]


def parse_processes(text: str) -> list[GpuProcess]:
    """Processes of `--query-compute-apps` of APP_FIELDS."""
    return [
        GpuProcess(uuid, int(pid), name, _number(used))
        for uuid, pid, name, used in _rows(text, len(APP_FIELDS))
        if pid.isdecimal()
    ]


def oldest_driver(cuda: str) -> tuple[int, ...]:
    """The oldest driver that CUDA `13.0` runs on; of a later version the newest that is known."""
    return OLDEST_DRIVER.get(int(cuda.partition(".")[0]), OLDEST_DRIVER[max(OLDEST_DRIVER)])


def version_numbers(version: str) -> tuple[int, ...]:
    """`580.82.07` -> (580, 82, 7)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _rows(text: str, columns: int) -> list[Sequence[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    return [row for row in rows if len(row) == columns]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _nvidia_smi(query: str) -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        raise RunError("nvidia-smi: not found; in a container it needs --nv, and the machine a GPU driver")
    try:
        done = subprocess.run(
            [command, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"nvidia-smi: no answer: {error}; the driver hangs, leave this node out") from error
    if done.returncode:
        what = (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RunError(f"nvidia-smi: {what}")
    return done.stdout
