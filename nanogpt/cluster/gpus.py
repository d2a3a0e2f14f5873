"""The GPUs of this machine from the driver's NVML: no CUDA context, no torch, a fraction of a second."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from nanogpt.errors import RunError
from nanogpt.gpus import OLDEST_DRIVER

T = TypeVar("T")
TIMEOUT_S = 15.0
MIB = 1 << 20
WORD_BITS = 64  # of NVML's sets of CPUs


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in MiB; None if the driver does not say, as for a GPU split into MIG instances."""

    index: int
    uuid: str
    name: str
    driver: str
    memory_mib: int | None
    used_mib: int | None


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU. `used_mib` None: unknown."""

    gpu_uuid: str
    pid: int
    name: str
    used_mib: int | None


def visible_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """This job's GPUs: all that the driver shows, or those of them in CUDA_VISIBLE_DEVICES.

    Raises:
        RunError: there is no driver, or it does not answer.
    """
    gpus = _ask(_gpus)
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible or len(visible) >= len(gpus):
        return gpus  # if Slurm confines devices, the driver counts the job's own from 0, as CUDA does
    return [gpu for gpu in gpus if str(gpu.index) in visible or any(gpu.uuid.startswith(name) for name in visible)]


def nearest_cpus(gpu: Gpu) -> set[int]:
    """The CPUs of the NUMA node that `gpu` belongs to; empty if the driver does not say. Raises `RunError`."""

    def cpus(nvml: Any) -> set[int]:
        size = (max(os.sched_getaffinity(0)) + WORD_BITS) // WORD_BITS
        device = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
        words = _asked(nvml, nvml.nvmlDeviceGetCpuAffinity, device, size) or ()
        return {WORD_BITS * at + bit for at, word in enumerate(words) for bit in range(WORD_BITS) if word >> bit & 1}

    return _ask(cpus)


def gpu_processes() -> list[GpuProcess]:
    """The processes on all visible GPUs. Raises `RunError` as `visible_gpus` does."""
    return _ask(_processes)


def oldest_driver(cuda: str) -> tuple[int, ...]:
    """The oldest driver that CUDA `13.0` runs on; for a later version, the newest known."""
    return OLDEST_DRIVER.get(int(cuda.partition(".")[0]), OLDEST_DRIVER[max(OLDEST_DRIVER)])


def version_numbers(version: str) -> tuple[int, ...]:
    """`580.82.07` -> (580, 82, 7)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _ask(question: Callable[[Any], T]) -> T:
    """NVML's answer, from a thread, since a hanging driver never answers."""
    answers: list[T | Exception] = []

    def ask() -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            try:
                answers.append(question(pynvml))
            finally:
                pynvml.nvmlShutdown()
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if not answers:
        raise RunError(f"NVIDIA driver: no answer in {TIMEOUT_S:.0f} s: it hangs; use another node")
    answer = answers[0]
    if isinstance(answer, ImportError):
        raise RunError("nvidia-ml-py: not installed; pip install nvidia-ml-py")
    if type(answer).__name__ in ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"):
        raise RunError("NVIDIA driver: not found; a container needs --nv, and the machine a GPU with its driver")
    if isinstance(answer, Exception):
        raise RunError(f"NVIDIA driver: {answer}") from answer
    return answer


def _devices(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


def _gpus(nvml: Any) -> list[Gpu]:
    driver = nvml.nvmlSystemGetDriverVersion()
    found = []
    for index, device in enumerate(_devices(nvml)):
        memory = _asked(nvml, nvml.nvmlDeviceGetMemoryInfo, device)
        total, used = (None, None) if memory is None else (memory.total // MIB, memory.used // MIB)
        name, uuid = nvml.nvmlDeviceGetName(device), nvml.nvmlDeviceGetUUID(device)
        found.append(Gpu(index, uuid, name, driver, total, used))
    return found


def _processes(nvml: Any) -> list[GpuProcess]:
    found = []
    for device in _devices(nvml):
        for process in _asked(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, device) or ():
            name = _asked(nvml, nvml.nvmlSystemGetProcessName, process.pid) or "?"
            used = None if process.usedGpuMemory is None else process.usedGpuMemory // MIB
            found.append(GpuProcess(nvml.nvmlDeviceGetUUID(device), process.pid, name, used))
    return found


def _asked(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns; None if the driver does not say, for this GPU or to this user."""
    try:
        return function(*arguments)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_NotFound):
        return None
