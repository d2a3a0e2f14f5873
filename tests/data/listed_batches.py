"""Small shards, and their batches in plain lists by the rules alone, slowly, for the tests of the loaders."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from nanogpt.data import documents_index
from nanogpt.data.micro_batches import MicroBatch
from nanogpt.data.shards import header_bytes, train_name
from nanogpt.data.training_batches import TrainBatches
from nanogpt.models.model_spec import Slot, SlotExtras

B = 9  # BOS of the small examples; their other tokens are 0..8
SHARD = [token for length in range(1, 31) for token in [B, *([length % B] * (length - 1))]]  # 465 tokens
Request = tuple[int, int]  # tokens of a slot, maximum document length
ListedSlot = tuple[list[int], list[int], list[int]]  # inputs, targets, cu_seqlens


def split_documents(shard: list[int]) -> list[list[int]]:
    documents: list[list[int]] = []
    for token in shard:
        if token == B:
            documents.append([token])
        elif documents:
            documents[-1].append(token)
    return documents


def padded(boundaries: list[int], tokens: int) -> list[int]:
    length = 128
    while length < tokens // 300:
        length += 128
    return boundaries + [tokens] * (length - len(boundaries))


def slow_steps(shards: list[list[int]], requests: list[Request], slots: int = 8) -> Iterator[list[ListedSlot]]:
    """The steps, ending early where the data do."""
    left = [split_documents(shard) for shard in shards]
    for tokens, maximum in requests:
        while left:
            queue = list(left[0])
            step: list[ListedSlot] = []
            while len(step) < slots:
                stream: list[int] = []
                boundaries = [0]
                while queue and len(stream) < tokens + 1:
                    for token in queue.pop(0)[:maximum]:
                        if len(stream) < tokens + 1:
                            stream.append(token)
                    boundaries.append(min(len(stream), tokens))
                if len(stream) < tokens + 1:
                    break
                step.append((stream[:-1], stream[1:], padded(boundaries, tokens)))
            if len(step) == slots:
                left[0] = queue
                yield step
                break
            left.pop(0)
        else:
            return


def as_lists(batch: MicroBatch) -> ListedSlot:
    return batch.inputs.tolist(), batch.targets.tolist(), batch.cu_seqlens.tolist()


def write_shards(folder: Path, shards: list[list[int]], name: Any = train_name) -> list[Path]:
    paths = [folder / name(index) for index in range(1, len(shards) + 1)]
    for path, tokens in zip(paths, shards, strict=True):
        path.write_bytes(header_bytes(len(tokens)) + np.array(tokens, dtype="<u2").tobytes())
    return paths


@contextmanager
def on_disk(shards: list[list[int]], piece: int = 7, window: int = 2) -> Iterator[list[Path]]:
    """The shards as files, read in pieces of a few tokens and dealt from windows of a few documents."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(documents_index, "PIECE_TOKENS", piece),
        mock.patch.object(documents_index, "_FIRST_WINDOW", window),
    ):
        yield write_shards(Path(folder), shards)


@contextmanager
def ranks(files: list[Path], world_size: int, **options: Any) -> Iterator[list[TrainBatches]]:
    loaders = [TrainBatches(files, rank=r, world_size=world_size, slots=8, bos=B, **options) for r in range(world_size)]
    try:
        yield loaders
    finally:
        for loader in loaders:
            loader.close()


def counting(slot: Slot) -> SlotExtras:
    """Arrays of several shapes, by tokens and terms of the loss; the state sums up what the slot has seen."""
    seen, steps = (slot.state or [0, 0]) if slot.loss else [-1, 0]
    state = [seen + int(slot.inputs.sum()) + slot.number, steps + 1]
    terms = len(slot.loss.token_weights) if slot.loss else 0
    arrays = {
        "place": np.array([slot.number, slot.slots, *state], dtype=np.int64),
        "shifted": np.stack([slot.targets.astype(np.int32) + k for k in range(terms + 1)]),
        "tokens": np.array(slot.inputs.size, dtype=np.float32),
    }
    return SlotExtras(arrays, state if slot.loss else None)


@st.composite
def a_shard(draw: st.DrawFn) -> list[int]:
    """One to some hundred documents; none, a few or many of them longer than the maxima asked for below."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    tokens = rng.integers(0, B, draw(st.integers(0, 3))).tolist()  # before the first BOS
    longest = draw(st.sampled_from([1, 2, 8, 30]))
    for length in rng.integers(1, longest + 1, draw(st.integers(1, 1500 // longest))).tolist():
        tokens += [B, *rng.integers(0, B, length - 1).tolist()]
    return tokens


shard_lists = st.lists(a_shard(), min_size=1, max_size=4)


world_sizes = st.sampled_from([1, 2, 4, 8])
quick = settings(max_examples=60, deadline=None)
