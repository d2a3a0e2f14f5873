"""Validation's batches against pieces of the stream cut from a plain list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from listed_batches import (
    B,
    ListedSlot,
    as_lists,
    counting,
    on_disk,
    padded,
    quick,
    shard_lists,
    world_sizes,
    write_shards,
)

from nanogpt.data.shards import ShardError, val_name
from nanogpt.data.validation_batches import ValBatches
from nanogpt.errors import InputError


def slow_pieces(stream: list[int], tokens: int, size: int) -> list[ListedSlot]:
    pieces = []
    for first in range(0, tokens, size):
        piece = stream[first : first + size + 1]
        boundaries = [0] + [i for i in range(1, size) if piece[i] == B] + [size]
        pieces.append((piece[:-1], piece[1:], padded(boundaries, size)))
    return pieces


@quick
@given(shard_lists, world_sizes, st.sampled_from([1, 4, 16]), st.integers(1, 3))
def test_validation_is_the_contiguous_stream(shards: list[list[int]], world_size: int, size: int, groups: int) -> None:
    stream = [token for shard in shards for token in shard]
    tokens = groups * 8 * size
    with on_disk(shards) as files:

        def loader(rank: int) -> ValBatches:
            return ValBatches(
                files, tokens=tokens, micro_batch_tokens=size, rank=rank, world_size=world_size, slots=8, bos=B
            )

        if len(stream) < tokens + 1:
            with pytest.raises(InputError, match=rf"of {len(stream)} tokens, {tokens + 1} are needed"):
                loader(0)
            return
        loaders = [loader(rank) for rank in range(world_size)]
        assert all(len(one) == groups * 8 // world_size for one in loaders)
        for _ in range(2):
            parts = [list(one) for one in loaders]
            assert all(batch.max_seqlen == size for part in parts for batch in part)
            assert [as_lists(part[i]) for i in range(len(parts[0])) for part in parts] == slow_pieces(
                stream, tokens, size
            )


def test_validation_documents_are_not_cut_and_have_the_right_types(tmp_path: Path) -> None:
    files = write_shards(tmp_path, [[1, 2, B, *([3] * 4000)], [4, B, *([5] * 4500)]], val_name)
    batches = list(ValBatches(files, tokens=8192, micro_batch_tokens=1024, slots=8, bos=B))
    assert [batch.cu_seqlens.unique().tolist() for batch in batches] == [
        [0, 2, 1024], [0, 1024], [0, 1024], [0, 4003 + 1 - 3 * 1024, 1024], *[[0, 1024]] * 4
    ]  # fmt: skip
    for batch in batches:
        assert (batch.inputs.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (
            torch.int32,
            torch.int64,
            torch.int32,
        )


def test_wrong_validation_data(tmp_path: Path) -> None:
    files = write_shards(tmp_path, [[B] * 2049], val_name)
    with pytest.raises(InputError, match=r"1,000 tokens, must be a positive multiple of 8 slots of 64 tokens \(512\)"):
        ValBatches(files, tokens=1000, micro_batch_tokens=64, slots=8, bos=B)
    with pytest.raises(InputError, match=r"of 2,049 tokens, 2,561 are needed.*--val-tokens"):
        ValBatches(files, tokens=2560, micro_batch_tokens=64, slots=8, bos=B)
    with pytest.raises(InputError, match=r"tokens 0 to 256 hold 256 documents; cu_seqlens has room for 127"):
        ValBatches(files, tokens=2048, micro_batch_tokens=256, slots=8, bos=B)
    assert len(ValBatches(files, tokens=1016, micro_batch_tokens=127, slots=8, bos=B)) == 8
    with pytest.raises(InputError, match="validation data: no shards found"):
        ValBatches([], tokens=512, micro_batch_tokens=64, slots=8, bos=B)
    with pytest.raises(InputError, match="world size: 5"):
        ValBatches(files, tokens=512, micro_batch_tokens=64, slots=8, bos=B, world_size=5)


def test_validation_tokens_are_checked_as_far_as_they_are_evaluated() -> None:
    stream = np.full(2000, 3)
    stream[::50] = B
    stream[1000] = B + 1
    sizes: dict[str, Any] = {"micro_batch_tokens": 64, "slots": 8, "bos": B, "vocab_size": B + 1}
    with on_disk([stream[:900].tolist(), stream[900:].tolist()]) as files:
        assert len(ValBatches(files, tokens=512, **sizes)) == 8
        with pytest.raises(ShardError) as caught:
            ValBatches(files, tokens=1024, **sizes)
        assert str(caught.value).startswith(
            f"{files[1]}: token 100 (from 0) is {B + 1}, the vocabulary is 0..{B} (model."
        )


def test_validation_has_extras_by_slot_and_no_state(tmp_path: Path) -> None:
    files = write_shards(tmp_path, [[B, *range(8)] * 30], val_name)
    place: dict[str, Any] = {"tokens": 256, "micro_batch_tokens": 16, "slots": 8, "bos": B, "extras": counting}
    for _ in range(2):
        batches = list(ValBatches(files, rank=1, world_size=2, **place))
        assert [batch.extras["place"][:2].tolist() for batch in batches] == [[slot, 8] for slot in (1, 3, 5, 7)] * 2
        for batch in batches:
            assert batch.extras["shifted"].tolist() == [batch.targets.tolist()]
            slot, _, seen, steps = batch.extras["place"].tolist()
            assert (seen, steps) == (int(batch.inputs.sum()) + slot - 1, 1)
