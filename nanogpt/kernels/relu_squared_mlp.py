"""The MLP of the speedrun, `relu(u up^T)^2 down`, after Primer (So et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def relu_squared_mlp_plain(u: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`relu(u @ up.T)**2 @ down` in plain PyTorch. u (T, D), up (F, D), down (F, D); returns (T, D)."""
    return torch.relu(u @ up.mT).square() @ down


def relu_squared_mlp(u: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`relu(u @ up.T)**2 @ down`. u (T, D), up (F, D), down (F, D), one dtype; returns (T, D). Differentiable."""
    return relu_squared_mlp_plain(u, up, down)
