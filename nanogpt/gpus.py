"""What is known of GPUs, in one place: the types that recipes can name, what they do, and what runs on which.

No torch is needed here. A new type is a row of `GPU_TYPES` and its name in `GpuName`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

GpuName = Literal["h100", "h200", "a100", "cpu"]  # what hardware.gpu can be
GPU_NAMES: tuple[str, ...] = get_args(GpuName)
Capability = tuple[int, int]  # CUDA's compute capability


class Speed(NamedTuple):
    """By the data sheet."""

    flops: float  # dense bf16 matrix products, operations a second
    memory: float  # bytes a second


@dataclass(frozen=True)
class GpuType:
    """A GPU that recipes can ask for by `name`, as Slurm does; bandwidths in GB/s of one direction."""

    name: str
    capability: Capability
    speed: Speed
    slow_flops: float  # of training, in the matrices: what no healthy machine fails to reach
    nvlink: float  # between two of a node, with room: copies reach 80 % and more of the link (NVLink 4: 450, 3: 300)
    pcie: float  # where they have no NVLink (PCIe 5 x16: 63, PCIe 4 x16: 32)
    cpus: int  # that a job asks for with each
    host_memory_gb: int  # likewise


GPU_TYPES = {
    gpu.name: gpu
    for gpu in (
        GpuType("h100", (9, 0), Speed(989e12, 3.35e12), 150e12, nvlink=280, pcie=20, cpus=15, host_memory_gb=24),
        GpuType("h200", (9, 0), Speed(989e12, 4.8e12), 150e12, nvlink=280, pcie=20, cpus=15, host_memory_gb=24),
        GpuType("a100", (8, 0), Speed(312e12, 1.9e12), 60e12, nvlink=180, pcie=10, cpus=15, host_memory_gb=24),
    )
}

# Devices by a part of the name that CUDA gives them, the first that fits.
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
    "L40S": Speed(362e12, 0.86e12),
    "L40": Speed(181e12, 0.86e12),
    "L4": Speed(121e12, 0.3e12),
    "A40": Speed(150e12, 0.7e12),
    "A10": Speed(125e12, 0.6e12),
    "4090": Speed(165e12, 1.0e12),
    "V100": Speed(125e12, 0.9e12),
    "T4": Speed(65e12, 0.3e12),
}

# The oldest Linux driver for each major version of CUDA: within one, newer toolkits run on older drivers.
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}

# The first capability that each has code for, and the first that it has none for again. FlashAttention 4 computes its
# backward pass from sm_90 on.
_RUNS_ON: dict[str, tuple[Capability, Capability]] = {
    "fa4": ((9, 0), (99, 0)),
    "fa3": ((9, 0), (10, 0)),
    "fa2": ((8, 0), (99, 0)),
    "varlen": ((8, 0), (99, 0)),
    "fp8": ((9, 0), (99, 0)),
    "triton": ((8, 0), (99, 0)),
}


def runs_on(what: str, capability: Capability) -> bool:
    """Whether a device has what `what` needs: an attention backend (fa4, ...), fp8 products, or our Triton kernels."""
    first, end = _RUNS_ON[what]
    return first <= capability < end


def types_with(what: str) -> tuple[str, ...]:
    """The names of the types on which `runs_on` is true."""
    return tuple(name for name, gpu in GPU_TYPES.items() if runs_on(what, gpu.capability))


def nearest_type(capability: Capability) -> str:
    """The name of the newest type that is no newer than the device, else of the oldest."""
    by_age = sorted(GPU_TYPES.values(), key=lambda gpu: gpu.capability)
    older = [gpu for gpu in by_age if gpu.capability <= capability]
    return (older[-1] if older else by_age[0]).name


def same_type(found: str, wanted: str) -> bool:
    """Whether a GPU that a site or the driver calls `found` is a `wanted`: `nvidia_h100_80gb_hbm3`, `H100-PCIe`."""
    return wanted in re.split(r"[^a-z0-9]+", found.lower())


def known_type(found: str) -> str | None:
    """The one of GPU_TYPES that a GPU called `found` is."""
    return next((gpu for gpu in GPU_TYPES if same_type(found, gpu)), None)


def device_speed(name: str) -> Speed | None:
    """Of the device that CUDA calls `name`; None: not known."""
    return next((speed for part, speed in _SPEEDS.items() if part.lower() in name.lower()), None)
