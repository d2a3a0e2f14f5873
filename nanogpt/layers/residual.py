"""The residual stream's sum."""

from __future__ import annotations

import torch
from torch import Tensor


def add(x: Tensor, y: Tensor) -> Tensor:
    """`x + y`, two tensors of one shape and dtype; bf16 numbers are summed in fp32 and rounded once, as usual.

    Written this way so that a compiler fuses it with the following norm, and not with the matrix product that made y:
    a product that adds to a matrix has to copy it first, 50 us for 49,152 tokens on an H100.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + y.to(wide)).to(x.dtype)
