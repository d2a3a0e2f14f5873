"""The prefix of each token: the longest proper beginning of its bytes that is a token itself.

Predicting it beside the token gives partial credit for the right beginning of a word (public record 88).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nanogpt.data.tokenizer import bpe_ranks


def gpt2_tokens() -> list[bytes]:
    """The bytes of GPT-2's 50,256 mergeable tokens, by their number."""
    ranks = bpe_ranks()
    return sorted(ranks, key=ranks.__getitem__)


def prefix_table(
    tokens: Sequence[bytes],  # by number
    rows: int,
) -> npt.NDArray[np.int64]:
    """(rows,) the number of each token's prefix; -1 for tokens without one, and beyond `tokens`.

    In byte order, a token's prefixes are the token before it and that one's own prefixes, where they begin it.
    """
    table = np.full(rows, -1, dtype=np.int64)
    open_prefixes: list[int] = []
    for number in sorted(range(len(tokens)), key=tokens.__getitem__):
        token = tokens[number]
        while open_prefixes and not token.startswith(tokens[open_prefixes[-1]]):
            open_prefixes.pop()
        if open_prefixes:
            table[number] = open_prefixes[-1]
        open_prefixes.append(number)
    return table
