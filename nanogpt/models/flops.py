"""Arithmetic that a training step needs, for model FLOP utilisation."""

from __future__ import annotations

from nanogpt.models.language_model import Windows
from nanogpt.spec_model import Gpt2ModelSpec, Record89ModelSpec, RecordModelSpec


def training_flops(spec: RecordModelSpec | Gpt2ModelSpec, tokens: int, windows: Windows) -> float:
    """Floating-point operations of forward and backward over `tokens` tokens, optimizer left out.

    Six a weight and token for the matrices, and attention's two products over the windows at their full reach
    (documents that are shorter need less).
    """
    head = spec.width * spec.padded_vocab_size
    mlp = 2 * spec.mlp_expansion * spec.width**2 * spec.layers
    if isinstance(spec, Gpt2ModelSpec):
        matrices = head + mlp + 4 * spec.width**2 * spec.layers
        reach = spec.layers * min(windows.long, spec.context) * spec.width
        return 6.0 * tokens * matrices + 12.0 * tokens * reach
    matrices = head + mlp + 4 * spec.width**2 * len(spec.attention_layers)
    if isinstance(spec, Record89ModelSpec):
        matrices += 4 * spec.mudd.hidden * spec.width  # four small nets; their second products do not count
    # A paired layer has twice the queries over half the heads: the same product of queries, keys and channels.
    reach = sum(windows.long if i in spec.long_window_layers else windows.short for i in spec.attention_layers)
    if isinstance(spec, Record89ModelSpec):
        reach += spec.dc_window
    return 6.0 * tokens * matrices + 12.0 * tokens * reach * spec.width
