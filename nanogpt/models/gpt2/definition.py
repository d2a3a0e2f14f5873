"""GPT-2 as its definition reads: one piece of a document, one block, one head at a time.

Shares nothing with the model; sizes come from the parameters `p`, by name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def layer_norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dense_piece(p: dict[str, Tensor], tokens: Tensor, heads: int) -> Tensor:
    """Logits (n, V) of a piece's tokens (n,), which see nothing else."""
    n, width = len(tokens), p["ln_f.weight"].shape[0]
    size = width // heads
    layers = sum(name.endswith("qkv.weight") for name in p)
    x = p["embed.weight"][tokens] + p["positions.weight"][:n]
    for i in range(layers):
        u = layer_norm(x, p, f"blocks.{i}.ln_1")
        q, k, v = linear(u, p, f"blocks.{i}.qkv").split(width, dim=1)
        joined = []
        for h in range(heads):
            part = slice(size * h, size * h + size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            joined.append(scores.softmax(dim=1) @ v[:, part])
        x = x + linear(torch.cat(joined, dim=1), p, f"blocks.{i}.attn_out")
        u = layer_norm(x, p, f"blocks.{i}.ln_2")
        x = x + linear(gelu(linear(u, p, f"blocks.{i}.mlp_up")), p, f"blocks.{i}.mlp_down")
    return layer_norm(x, p, "ln_f") @ p["embed.weight"].T


def dense_logits(p: dict[str, Tensor], tokens: Tensor, ends: list[int], *, context: int, heads: int) -> Tensor:
    """Logits (T, V) of tokens (T,) in documents that end at `ends`, each read in pieces of at most `context` tokens."""
    logits, start = [], 0
    for end in ends:
        for first in range(start, end, context):
            logits.append(dense_piece(p, tokens[first : min(first + context, end)], heads))
        start = end
    return torch.cat(logits)
