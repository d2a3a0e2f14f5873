"""Where a hand-written kernel runs and where its plain equivalent does, and how to pass a number to a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from nanogpt.gpus import Capability, Needs, meets

# For kernels that need no more than every GPU since the A100 has.
ANY = Needs((8, 0))


def runs_kernel(*tensors: Tensor, needs: Needs = ANY, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a Triton kernel takes these tensors: all of `dtype`, on one GPU that has what it `needs`.

    The answer is a constant under `torch.compile`.
    """
    first = tensors[0]
    return (
        first.is_cuda
        and all(x.dtype == dtype and x.device == first.device for x in tensors)
        and meets(needs, device_capability(first.device))
    )


def device_capability(device: torch.device) -> Capability:
    """The GPU's compute capability, (9, 0) for an H100. Every choice that depends on it asks here."""
    return torch.cuda.get_device_capability(device)


def run_time_number(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a CPU tensor (), which an operation reads when it runs: under `torch.compile`, a number given as a
    tensor is not a constant of the code, so one graph serves all its values.
    """
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")
