"""The unigram cross-entropy: the loss of a model that knows only how frequent each token is.

A run that does not end well below it has learned nothing from context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nanogpt.data.shards import Tokens, read_tokens
from nanogpt.errors import InputError

CHUNK_TOKENS = 1 << 20  # counted at a time: NumPy widens them to int64


def unigram_cross_entropy(
    train_files: Sequence[Path], val_files: Sequence[Path], val_tokens: int, vocab_size: int
) -> float:
    """Mean of -ln p(target) in nats over the targets of an evaluation of `val_tokens` tokens.

    p(token) = (n + 1) / (N + vocab_size), where n of the N tokens in the training shards are that token (add-one
    smoothing). Targets are tokens 1..val_tokens of the validation stream, inclusive: the input shifted by one.

    Raises:
        ShardError: a file is missing or not a shard.
        InputError: no files, fewer than `val_tokens + 1` validation tokens, or a token outside the vocabulary.
    """
    if not train_files or not val_files:
        raise InputError("unigram cross-entropy: needs training and validation shards; run prep-fineweb or prep-text")
    seen = np.zeros(vocab_size, dtype=np.int64)
    for path in sorted(train_files):
        seen += _counts(path, read_tokens(path), vocab_size)

    wanted = np.zeros(vocab_size, dtype=np.int64)
    first, left = 1, val_tokens  # the stream's first token is not a target
    for path in sorted(val_files):
        if not left:
            break
        tokens = read_tokens(path)
        targets = tokens[first : first + left]
        wanted += _counts(path, targets, vocab_size)
        left -= targets.size
        first = max(0, first - tokens.size)
    if left:
        raise InputError(
            f"{val_files[0].parent}: the validation shards hold {val_tokens - left + 1:,} tokens, {val_tokens + 1:,}"
            " are needed; prepare more (prep-text --val-tokens N)"
        )
    log_p = np.log(seen + 1.0) - np.log(float(seen.sum() + vocab_size))
    return float(-(wanted @ log_p) / val_tokens)


def _counts(path: Path, tokens: Tokens, vocab_size: int) -> npt.NDArray[np.int64]:
    """The count of each token: (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in _chunks(tokens):
        some = np.bincount(chunk, minlength=vocab_size)
        if some.size > vocab_size:
            raise InputError(
                f"{path}: has token {some.size - 1}, the vocabulary has {vocab_size}; another tokenizer's?"
            )
        counts += some
    return counts


def _chunks(tokens: Tokens) -> Iterable[Tokens]:
    return (tokens[start : start + CHUNK_TOKENS] for start in range(0, tokens.size, CHUNK_TOKENS))
