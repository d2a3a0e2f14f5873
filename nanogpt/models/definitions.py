"""What the definitions of the records' models share: norm, rotary and YaRN, attention of one head. In fp64, by hand.

Shares nothing with the models.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

EPS = 2.0**-23


def rms_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def start_frequencies(count: int) -> list[np.float32]:
    return [np.float32((1 / 1024) ** (j / (count - 1))) for j in range(count)]


def yarn(frequencies: list[np.float32], old: int, new: int) -> list[np.float32]:
    result = []
    for f in frequencies:
        r = old * float(f) / (2 * math.pi)
        g = min(max((r - 1) / 31, 0.0), 1.0)
        result.append(np.float32(float(f) * (old / new + g * (1 - old / new))))
    return result


def rotate(x: Tensor, positions: list[int], frequencies: list[np.float32]) -> Tensor:
    """One head, (T, head_dim), token t at position positions[t]."""
    out = list(x.unbind(1))
    for j, f in enumerate(frequencies):
        angle = [float(np.float32(position) * f) for position in positions]  # rounded to fp32
        c = torch.tensor([math.cos(a) for a in angle], dtype=x.dtype)
        s = torch.tensor([math.sin(a) for a in angle], dtype=x.dtype)
        out[2 * j] = c * x[:, 2 * j] + s * x[:, 2 * j + 1]
        out[2 * j + 1] = c * x[:, 2 * j + 1] - s * x[:, 2 * j]
    return torch.stack(out, dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, document: list[int], window: int, scale: float) -> Tensor:
    """q, k, v (rows, heads, head_dim); `document` numbers each row's document."""
    rows = range(q.shape[0])
    seen = torch.tensor([[document[j] == document[i] and i - window <= j <= i for j in rows] for i in rows])
    out = []
    for h in range(q.shape[1]):
        weights = torch.exp(scale * (q[:, h] @ k[:, h].T)) * seen
        out.append(weights / weights.sum(1, keepdim=True) @ v[:, h])
    return torch.stack(out, dim=1)
