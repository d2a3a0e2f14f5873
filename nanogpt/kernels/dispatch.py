"""Where a hand-written kernel runs, and where its plain equal does."""

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
