"""Shards of made-up tokens, for work that needs shapes and frequencies but no text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanogpt.data.shards import train_name, val_name, write_tokens

if TYPE_CHECKING:
    from nanogpt.spec import RunSpec


def write_shards_for(spec: RunSpec, directory: Path) -> None:
    """Shards for a few steps of every stage, read again where they end, and for a validation."""
    largest = max(stage.batch_tokens for stage in spec.training.all_stages)
    tokens = {"train_tokens": 20 * largest, "val_tokens": spec.evaluation.tokens + 1}
    write_made_up_shards(directory, **tokens, bos=spec.data.bos)


def write_made_up_shards(directory: Path, *, train_tokens: int, val_tokens: int, bos: int, seed: int = 0) -> None:
    """Shards of random tokens in documents of web-like lengths (log-normal, median 400), below `bos`."""
    generator = np.random.default_rng(seed)
    for name, count in ((train_name(1), train_tokens), (val_name(), val_tokens)):
        # A Zipf-like spread over the vocabulary, as text has it: frequent tokens decide how many rows are touched.
        tokens = np.minimum(bos ** generator.random(count), bos - 1).astype(np.uint16)
        lengths = np.maximum(generator.lognormal(np.log(400), 1.0, size=count // 100 + 1).astype(np.int64), 2)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        tokens[starts[starts < count]] = bos
        write_tokens(directory / name, tokens)
