"""Where a hand-written kernel runs, and where its plain equal does; and how a kernel is given a number."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_kernel(*tensors: Tensor, capability: int) -> bool:
    """Whether the Triton kernels take these tensors: bf16, on one GPU of compute capability `capability`.x or newer.

    The answer is a constant under `torch.compile`.
    """
    first = tensors[0]
    return (
        first.is_cuda
        and all(x.dtype == torch.bfloat16 and x.device == first.device for x in tensors)
        and torch.cuda.get_device_capability(first.device)[0] >= capability
    )


def run_time_number(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a CPU tensor (), which an operation reads when it runs: under `torch.compile`, a number given as a
    tensor is no constant of the code, so that one graph serves all its values.
    """
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")
