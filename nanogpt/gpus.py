"""All facts about GPUs in one place: the types that recipes can name, their speed, and what runs on which.

No torch is needed here. A new type is a row of `GPU_TYPES` and its name in `GpuName`.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

GpuName = Literal["h100", "h200", "a100", "l40s", "cpu"]  # what hardware.gpu can be
GPU_NAMES: tuple[str, ...] = get_args(GpuName)
Capability = tuple[int, int]  # CUDA's compute capability


class Speed(NamedTuple):
    """By the data sheet."""

    flops: float  # dense bf16 matrix products, operations per second
    memory: float  # bytes per second


@dataclass(frozen=True)
class GpuType:
    """A GPU that recipes can ask for by `name`, as Slurm does; bandwidths in GB/s, one way."""

    name: str
    capability: Capability
    speed: Speed
    slow_flops: float  # of training, in the matrices: every healthy machine reaches it
    nvlink: float | None  # between two GPUs of a node: copies reach 80 % and more of the link (NVLink 4: 450, 3: 300)
    pcie: float  # where they have no NVLink (PCIe 5 x16: 63, PCIe 4 x16: 32)
    cpus: int  # that a job asks for per GPU
    host_memory_gb: int  # likewise


GPU_TYPES = {
    gpu.name: gpu
    for gpu in (
        GpuType("h100", (9, 0), Speed(989e12, 3.35e12), 150e12, nvlink=280, pcie=20, cpus=8, host_memory_gb=24),
        GpuType("h200", (9, 0), Speed(989e12, 4.8e12), 150e12, nvlink=280, pcie=20, cpus=8, host_memory_gb=24),
        GpuType("a100", (8, 0), Speed(312e12, 1.9e12), 60e12, nvlink=180, pcie=10, cpus=8, host_memory_gb=24),
        GpuType("l40s", (8, 9), Speed(362e12, 0.86e12), 40e12, nvlink=None, pcie=8, cpus=8, host_memory_gb=24),
    )
}

# Devices by a part of their CUDA name; the first match counts.
_SPEEDS = {
    "B300": Speed(2250e12, 8.0e12),
    "B200": Speed(2250e12, 8.0e12),
    "GH200": Speed(989e12, 4.0e12),
    "H200": GPU_TYPES["h200"].speed,
    "H100 PCIe": Speed(756e12, 2.0e12),
    "H100": GPU_TYPES["h100"].speed,
    "H800": GPU_TYPES["h100"].speed,
    "A100": GPU_TYPES["a100"].speed,
    "A800": GPU_TYPES["a100"].speed,
    "L40S": GPU_TYPES["l40s"].speed,
    "L40": Speed(181e12, 0.86e12),
    "L4": Speed(121e12, 0.3e12),
    "RTX PRO 6000": Speed(503e12, 1.6e12),
    "A40": Speed(150e12, 0.7e12),
    "A10": Speed(125e12, 0.6e12),
    "4090": Speed(165e12, 1.0e12),
    "V100": Speed(125e12, 0.9e12),
    "T4": Speed(65e12, 0.3e12),
}

# The oldest Linux driver for each major version of CUDA: within one, newer toolkits run on older drivers.
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}


class Multiprocessor(NamedTuple):
    """What a multiprocessor has, by the CUDA programming guide's table of compute capabilities."""

    block_shared: int  # bytes of shared memory that one block can have
    shared: int  # bytes of shared memory
    warps: int


_LARGE, _SMALL = Multiprocessor(232_448, 233_472, 64), Multiprocessor(101_376, 102_400, 48)
MULTIPROCESSORS: dict[Capability, Multiprocessor] = {
    (8, 0): Multiprocessor(166_912, 167_936, 64),  # A100
    (8, 6): _SMALL,  # A40, RTX 30
    (8, 9): _SMALL,  # L40S, L4, RTX 40
    (9, 0): _LARGE,  # H100, H200
    (10, 0): _LARGE,  # B200
    (10, 3): _LARGE,  # B300
    (12, 0): _SMALL,  # RTX PRO 6000 Blackwell, RTX 50
    (12, 1): _SMALL,
}


class Needs(NamedTuple):
    """What code needs from a GPU."""

    first: Capability  # the first that has code
    end: Capability = (99, 0)  # the first that has none any more
    shared: int = 0  # bytes of shared memory of one block


FP8 = Needs((8, 9))  # products of 8-bit floats, and conversions to them

# FlashAttention 4 computes its backward pass on sm_90 and sm_100; the library's kernels for sm_120 lack it.
_RUNS_ON = {
    "fa4": Needs((9, 0), end=(12, 0)),
    "fa3": Needs((9, 0), end=(10, 0)),
    "fa2": Needs((8, 0)),
    "varlen": Needs((8, 0)),
    "fp8": FP8,
    "triton": Needs((8, 0)),
}


def meets(needs: Needs, capability: Capability) -> bool:
    """Whether a device has what `needs` asks. An unknown device counts as having the least shared memory of all."""
    room = MULTIPROCESSORS.get(capability, _SMALL).block_shared
    return needs.first <= capability < needs.end and needs.shared <= room


def runs_on(what: str, capability: Capability) -> bool:
    """Whether a device has what `what` needs: an attention backend (fa4, ...), fp8 products, or our Triton kernels."""
    return meets(_RUNS_ON[what], capability)


def types_with(what: str) -> tuple[str, ...]:
    """The names of the types on which `runs_on` is true."""
    return tuple(name for name, gpu in GPU_TYPES.items() if runs_on(what, gpu.capability))


def nearest_type(capability: Capability) -> str:
    """The name of the newest type not newer than the device, else of the oldest."""
    by_age = sorted(GPU_TYPES.values(), key=lambda gpu: gpu.capability)
    older = [gpu for gpu in by_age if gpu.capability <= capability]
    return (older[-1] if older else by_age[0]).name


def same_type(found: str, wanted: str) -> bool:
    """Whether a GPU that the site or the driver calls `found` is a `wanted`: `nvidia_h100_80gb_hbm3`, `H100-PCIe`."""
    return wanted in re.split(r"[^a-z0-9]+", found.lower())


def known_type(found: str) -> str | None:
    """The one of GPU_TYPES that a GPU called `found` is."""
    return next((gpu for gpu in GPU_TYPES if same_type(found, gpu)), None)


def device_speed(name: str) -> Speed | None:
    """Of the device that CUDA calls `name`; None: not known."""
    return next((speed for part, speed in _SPEEDS.items() if part.lower() in name.lower()), None)


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports; None: there is no libcuda to ask."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


OTHER_DRIVER = "Use nodes with a newer one (another partition, --exclude=NODE), or ask the administrator"


def newer_driver(built_for: str, driver_cuda: tuple[int, int]) -> str | None:
    """The driver that libraries for CUDA `13.0` need if the present one is too old; None: they run."""
    major = int(built_for.partition(".")[0])
    if driver_cuda[0] >= major:
        return None
    oldest = f"driver {OLDEST_DRIVER[major][0]} or newer" if major in OLDEST_DRIVER else "a newer driver"
    return f"CUDA {major} needs {oldest}"
