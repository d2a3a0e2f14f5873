"""Hashed n-grams: which rows of the table, and which sign vectors, each token of a micro-batch reads. No torch.

The hashes, their multipliers and the quirk are the public record's (number 92, PR #360); the first hashed bigrams were
record 62's. They run over the flat stream: a document's first tokens are hashed with the end of the one before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from nanogpt.models.model_spec import Tokens

Rows = npt.NDArray[np.int32]


def ngram_rows(tokens: Tokens, rows: int) -> Rows:
    """(2, T) int32: each token's bigram row, in the first half of the table's `rows` (even), and trigram row, in the
    second half. Tokens without enough history read the half's last row, which no hash gives.

    tokens: (T,) uint16.
    """
    half = rows // 2
    own = tokens.astype(np.uint32)  # products wrap at 32 bits; the remainder is that of the signed number, from 0 on
    before = own.copy()
    before[:1] = half - 1  # a quirk of the record: token 1's bigram is hashed with token 0's row instead of token 0
    found = np.empty((2, own.size), dtype=np.int32)
    found[0, :1], found[1, :2] = half - 1, rows - 1
    found[0, 1:] = _remainder(36313 * own[1:] ^ 27191 * before[:-1], half - 1)
    trigram = 17351 * own[2:] ^ 60961 * own[1:-1] ^ 45259 * own[:-2]
    found[1, 2:] = half + _remainder(trigram, half - 1)
    return found


def _remainder(mixed: npt.NDArray[np.uint32], divisor: int) -> Rows:
    """Of signed numbers, from 0 on. NumPy divides by one number far faster than it takes remainders."""
    signed = mixed.view(np.int32)
    return signed - signed // divisor * divisor


def sign_rows(tokens: Tokens, count: int) -> Rows:
    """(2, T) int32: the vectors, of `count` (a power of two), that each token's bigram and trigram are multiplied by.

    Vector 0 for tokens without enough history. tokens: (T,) uint16.
    """
    own = tokens.astype(np.uint32)
    found = np.zeros((2, own.size), dtype=np.int32)
    found[0, 1:] = (48271 * own[1:] ^ 30011 * own[:-1]) & (count - 1)
    found[1, 2:] = (58699 * own[2:] ^ 39779 * own[1:-1] ^ 26801 * own[:-2]) & (count - 1)
    return found
