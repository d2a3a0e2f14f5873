"""The batches of a validation: the start of the stream, whatever documents are in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from nanogpt.data.micro_batches import Copier, Extras, MicroBatch, check_ranks, cu_seqlens_length, no_extras
from nanogpt.data.shards import (
    HEADER_BYTES,
    ShardError,
    Tokens,
    check_tokens,
    number_of_shards,
    read_count,
    sorted_shards,
)
from nanogpt.errors import InputError
from nanogpt.files import open_regular
from nanogpt.models.model_spec import Slot


class ValBatches:
    """Validation micro-batches of one rank: the first `tokens` of the stream, cut into pieces of equal size.

    Piece p, the tokens from `p * micro_batch_tokens` plus one for the last target, is slot `p % slots` of its
    group, and belongs to rank `p % world_size`. Documents have no maximum length; they begin at BOS tokens, and if a
    piece begins inside a document, the rest counts as one. Iterating starts over each time. Shards follow one
    another. Everything is read and checked here, on every rank; `sha256` is of the stream
    as it was read: `tokens` + 1 little-endian uint16.

    Args:
        files: The validation shards, the same on every rank.
        tokens: Tokens to evaluate, over all ranks; a multiple of `slots * micro_batch_tokens`.
        micro_batch_tokens: T of a micro-batch.
        slots: Micro-batches in a group over all ranks.
        rank: This process's rank.
        world_size: Number of ranks; divides `slots`.
        bos: The token that starts every document.
        vocab_size: Tokens from this one on are refused.
        device: Where micro-batches go.
        extras: As for `TrainBatches`.

    Raises:
        ShardError: a file is missing or not a shard, or has a token outside the vocabulary.
        InputError: no files, too few tokens, sizes that do not divide, or more documents in a piece than
            `cu_seqlens` has room for.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        tokens: int,
        micro_batch_tokens: int,
        slots: int,
        rank: int = 0,
        world_size: int = 1,
        bos: int,
        vocab_size: int = 1 << 16,
        device: torch.device | str = "cpu",
        extras: Extras = no_extras,
    ):
        check_ranks(slots, rank, world_size)
        self._extras = extras
        self._slots = slots
        if micro_batch_tokens < 1 or tokens < 1 or tokens % (slots * micro_batch_tokens):
            raise InputError(
                f"validation: {tokens:,} tokens, must be a positive multiple of {slots} slots of "
                f"{micro_batch_tokens:,} tokens ({slots * micro_batch_tokens:,})"
            )
        paths = sorted_shards(files, "validation")
        stream = read_stream(paths, tokens + 1, vocab_size)
        self.sha256 = hashlib.sha256(stream.view(np.uint8).data).hexdigest()
        self._tokens = micro_batch_tokens
        self._copier = Copier(torch.device(device))
        self._pieces: list[tuple[int, Tokens, npt.NDArray[np.int64]]] = []
        room = cu_seqlens_length(micro_batch_tokens) - 1
        for piece, first in enumerate(range(0, tokens, micro_batch_tokens)):
            own = stream[first : first + micro_batch_tokens + 1]
            ends = np.append(np.flatnonzero(own[1:-1] == bos) + 1, micro_batch_tokens)
            if ends.size > room:
                raise InputError(
                    f"{paths[0]}: validation tokens {first:,} to {first + micro_batch_tokens:,} hold {ends.size:,} "
                    f"documents; cu_seqlens has room for {room:,}. Join short texts into longer documents before "
                    "prep-text, or lower the validation micro-batch"
                )
            if piece % world_size == rank:
                self._pieces.append((piece % slots, own.copy(), ends))

    def __iter__(self) -> Iterator[MicroBatch]:
        for slot, piece, ends in self._pieces:
            extras = self._extras(Slot(piece[:-1], piece[1:], None, slot, self._slots))
            host = self._copier.host_step(1, self._tokens, cu_seqlens_length(self._tokens), extras)
            host.fill(0, piece, ends, extras.arrays)
            yield self._copier.hand_out(host, self._tokens)[0]

    def __len__(self) -> int:
        return len(self._pieces)


def read_stream(paths: Sequence[Path], wanted: int, vocab_size: int = 1 << 16) -> Tokens:
    """The first `wanted` tokens of the concatenated validation shards, (wanted,) uint16.

    Raises:
        ShardError: a file is missing or not a shard, or has a token from `vocab_size` on.
        InputError: too few tokens.
    """
    counts = [read_count(path) for path in paths]
    if sum(counts) < wanted:
        raise InputError(
            f"validation data: {number_of_shards(len(paths))} in {paths[0].parent} of {sum(counts):,} tokens, "
            f"{wanted:,} are needed (one more than are evaluated). Prepare more (prep-text --val-tokens N), "
            "or evaluate fewer (evaluation.tokens in the recipe; nanogpt evaluate --tokens N)"
        )
    parts: list[Tokens] = []
    for path, count in zip(paths, counts, strict=True):
        take = min(count, wanted)
        with open_regular(path) as file:
            file.seek(HEADER_BYTES)
            part = np.fromfile(file, dtype="<u2", count=take)
        if part.size != take:
            raise ShardError(f"{path}: {part.size:,} tokens could be read of {take:,}: the file changed while read")
        check_tokens(path, part, vocab_size)
        parts.append(part)
        wanted -= take
        if not wanted:
            break
    return np.concatenate(parts)
