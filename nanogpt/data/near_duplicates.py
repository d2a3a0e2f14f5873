"""Find documents that are nearly equal, by MinHash of their tokens: `prep-text --near-duplicates`.

A document is the set of its runs of `SHINGLE` tokens. Two are near-duplicates if the Jaccard similarity of these
sets, estimated from `HASHES` minima of each, is at least `SIMILAR`. Those that agree in all minima of one of `BANDS`
bands are compared, with the first such document and with the one before (Broder 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, chapter 3). A document nearly equal to a near-duplicate is one too.

The package rensa computes the minima; a signature depends only on the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from nanogpt.errors import InputError

SHINGLE = 5
HASHES = 126
BANDS = 21  # of 6 minima: finds 99.8 % of the pairs of similarity 0.8, 28 % of those of 0.5
SIMILAR = 0.8
SEED = 1
COMPARED = 1 << 16  # pairs at a time

TokenIds = npt.NDArray[np.uint32]
Signatures = npt.NDArray[np.uint32]  # (documents, HASHES)


def check_installed() -> None:
    """Raise `InputError` if rensa is missing."""
    if find_spec("rensa") is None:
        raise InputError(
            "--near-duplicates needs the package rensa, which is not installed;"
            " run: pip install 'nanogpt-speedrun[text]'"
        )


def signatures(documents: Sequence[TokenIds]) -> Signatures:
    """Signatures of documents given as token ids, without BOS and never empty: (documents, HASHES)."""
    from rensa import RMinHash

    if not documents:
        return np.empty((0, HASHES), dtype=np.uint32)
    shingles = [_shingles(tokens) for tokens in documents]
    ends = np.cumsum([0, *(each.size for each in shingles)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(shingles), ends, HASHES, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _shingles(tokens: TokenIds) -> npt.NDArray[np.uint64]:
    """A hash of each run of `SHINGLE` tokens, (runs,); of all tokens if there are fewer."""
    run = min(SHINGLE, tokens.size)
    wide = tokens.astype(np.uint64) + np.uint64(1)
    mixed = np.zeros(tokens.size - run + 1, dtype=np.uint64)
    for offset in range(run):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + wide[offset : offset + mixed.size]
    mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return mixed ^ (mixed >> np.uint64(33))


def near_duplicates(found: Signatures) -> npt.NDArray[np.int64]:
    """For each document the first that it nearly equals, perhaps by way of others, else itself: (documents,)."""
    count = len(found)
    labels = np.arange(count)
    pairs = []
    for band in np.split(found, BANDS, axis=1):
        key = np.zeros(count, dtype=np.uint64)
        for minima in band.T:
            key = (key ^ minima) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        order = np.argsort(key, kind="stable")
        new = np.diff(key[order], prepend=~key[order[:1]]) != 0
        first = order[np.maximum.accumulate(np.where(new, labels, 0))]
        pairs += [other[~new] * count + order[~new] for other in (first, np.roll(order, 1))]
    candidates = np.unique(np.concatenate(pairs))
    alike = [
        part[(found[part // count] == found[part % count]).mean(axis=1) >= SIMILAR]
        for part in np.split(candidates, range(COMPARED, candidates.size, COMPARED))
    ]
    a, b = np.divmod(np.concatenate(alike), count)
    while True:
        least = labels.copy()
        np.minimum.at(least, a, labels[b])
        np.minimum.at(least, b, labels[a])
        least = least[least]
        if np.array_equal(least, labels):
            return labels
        labels = least
