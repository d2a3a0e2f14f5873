"""Which tokens GPT-2's tokenizer never produces after which: a bit for each pair, from the merge ranks alone.

Byte-pair encoding of p's and x's bytes together may merge across the seam between them. Then no text is tokenized as p,
x, since nothing around them can prevent that merge: both are whole tokens, and their merges are
their own. Such a pair is marked, unless the pattern that splits text into pieces may cut at the seam (`cut_classes`).

A merge of rank r happens across the seam if a and b are the halves of token r, a is p's last piece after p's merges
of ranks up to r, and b is x's first piece after x's merges of ranks below r: of equal ranks the leftmost
merges first. The ranks of a token's merges only increase. So among tokens that ever ended in a, those that keep it
longer meet the same merges across the seam and some more, which makes the work short: 3 s on one core.

The idea, and the evaluation it serves, are public record 91's (PR #350 of KellerJordan/modded-nanogpt).
"""

from __future__ import annotations

import itertools
import mmap
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nanogpt.data.prefixes import gpt2_tokens
from nanogpt.errors import RunError

Mask = npt.NDArray[np.uint8]

NONZERO_BYTES = 58_810_565  # of GPT-2's mask, in 47,432 rows; 70,889,701 bits

CONTRACTIONS = (b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d")  # the pattern cuts after them
SPACE, NUMBER, LETTER, OTHER, INSIDE = range(5)  # classes of characters; INSIDE: no whole character there


def character_class(token: bytes, *, last: bool) -> int:
    """The class of the token's last or first character."""
    for size in range(1, 5):
        with suppress(UnicodeDecodeError):
            text = (token[-size:] if last else token[:size]).decode()
            if len(text) == 1:
                if text.isspace():
                    return SPACE
                return {"N": NUMBER, "L": LETTER}.get(unicodedata.category(text)[0], OTHER)
    return INSIDE


def cut_classes(before: int) -> tuple[int, ...]:
    """The classes of first characters before which the pattern may cut, after a last one of class `before`."""
    return (INSIDE, *{SPACE: (SPACE,), OTHER: (LETTER,)}.get(before, ()))


class Merge(NamedTuple):
    """One merge of a token's bytes."""

    rank: int
    left: bytes
    right: bytes
    first: bool  # the left half is the token's first piece
    last: bool  # the right half is its last


def merges_of(token: bytes, ranks: dict[bytes, int]) -> list[Merge]:
    """The merges that make the token, in order: lowest rank first, among equals the leftmost."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    none = len(ranks)
    found = [ranks.get(a + b, none) for a, b in itertools.pairwise(pieces)]
    merges = []
    while found and (rank := min(found)) < none:
        at = found.index(rank)
        left, right = pieces[at : at + 2]
        merges.append(Merge(rank, left, right, at == 0, at == len(found) - 1))
        pieces[at : at + 2] = [left + right]
        del found[at]
        for place in (at - 1, at):
            if 0 <= place < len(found):
                found[place] = ranks.get(pieces[place] + pieces[place + 1], none)
    return merges


def mark_never_next(tokens: Sequence[bytes], mask: Mask) -> None:
    """Set bit x of row p, little-endian in its bytes, for every marked pair (p, x).

    Args:
        tokens: by rank, single bytes first.
        mask: (rows, rows / 8) zeros, with at least as many rows as tokens.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    seams: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by left half: rank of the merge, right half
    ending: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by last piece: rank of the merge that ends it, token
    beginning: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by first piece, likewise
    for number, token in enumerate(tokens):
        first, last = ranks[token[:1]], ranks[token[-1:]]
        merges = merges_of(token, ranks)
        for merge in merges:
            if merge.last:
                ending[last].append((merge.rank, number))
                last = merge.rank
            if merge.first:
                beginning[first].append((merge.rank, number))
                first = merge.rank
        ending[last].append((len(tokens), number))
        beginning[first].append((len(tokens), number))
        if merges and merges[-1].rank == number:
            seams[ranks[merges[-1].left]].append((number, ranks[merges[-1].right]))
    # By first piece: tokens that keep it longest first, and the ranks that end it, negated and so ascending.
    keeping = {
        piece: np.array([number for _, number in sorted(kept, reverse=True)]) for piece, kept in beginning.items()
    }
    until = {piece: np.array(sorted(-rank for rank, _ in kept)) for piece, kept in beginning.items()}

    for piece, merged in seams.items():
        marked, done = np.zeros(len(mask), dtype=np.bool_), 0
        packed = np.zeros(len(mask) // 8, dtype=np.uint8)
        for ended, number in sorted(ending[piece]):
            before = done
            while done < len(merged) and merged[done][0] < ended:
                rank, right = merged[done]
                marked[keeping[right][: np.searchsorted(until[right], -rank, side="right")]] = True
                done += 1
            if done > before:
                packed = np.packbits(marked, bitorder="little")
            mask[number] |= packed

    firsts = np.full(len(mask), INSIDE)
    firsts[: len(tokens)] = [character_class(token, last=False) for token in tokens]
    kept = [np.packbits(~np.isin(firsts, cut_classes(before)), bitorder="little") for before in range(5)]
    for number, token in enumerate(tokens):
        mask[number] &= 0 if token in CONTRACTIONS else kept[character_class(token, last=True)]


def build(mask: Mask) -> None:
    """GPT-2's mask into `mask`, (rows, rows / 8) zeros. Raises `RunError` if it is not the known one."""
    mark_never_next(gpt2_tokens(), mask)
    found = int(np.count_nonzero(mask))
    if found != NONZERO_BYTES:
        raise RunError(
            f"the canonical mask has {found:,} bytes that are not zero, GPT-2's has {NONZERO_BYTES:,}: this Python's"
            f" Unicode {unicodedata.unidata_version} may class a token's characters otherwise; use another Python"
        )


def main(descriptor: str, rows: str) -> None:
    """Write it into the open file of that number, shared with the process that started this one."""
    count = int(rows)
    with mmap.mmap(int(descriptor), count * count // 8) as memory:
        build(np.frombuffer(memory, dtype=np.uint8).reshape(count, -1))


if __name__ == "__main__":
    main(*sys.argv[1:])
