"""Micro-batches: what a model is given at once, its memory on the host, and its way to the device.

Shapes depend on the micro-batch size alone, including `cu_seqlens`, so nothing is compiled twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanogpt.data.shards import Tokens
from nanogpt.errors import InputError
from nanogpt.models.model_spec import Slot, SlotExtras

Extras = Callable[[Slot], SlotExtras]


def no_extras(slot: Slot) -> SlotExtras:
    """Only the tokens."""
    return SlotExtras({})


class LoaderArguments(TypedDict):
    """What the loaders of a rank's batches, training's and validation's, are made with alike."""

    slots: int
    rank: int
    world_size: int
    bos: int
    vocab_size: int
    device: torch.device
    extras: Extras


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One slot of a step on one rank: T tokens of consecutive documents as a flat stream.

    Its segments, used by attention alone, are the documents, or pieces of them if the stage says so.
    """

    inputs: Tensor  # (T,) int32
    targets: Tensor  # (T,) int64: inputs shifted by one; a document's last target is the next one's BOS
    cu_seqlens: Tensor  # (n,) int32: 0, the segments' running ends, then T repeated; see cu_seqlens_length
    max_seqlen: int  # the longest possible segment: the stage's maximum in training, T in validation
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # the arrays from `Extras`, as tensors


def cu_seqlens_length(tokens: int, max_documents: int | None = None) -> int:
    """Entries of `cu_seqlens` for a micro-batch of `tokens`: one more than the segments it has room for.

    Without `max_documents`: floor(tokens / 300), rounded up to a multiple of 128.
    """
    return max(128, -(-(tokens // 300) // 128) * 128) if max_documents is None else max_documents + 1


class HostStep:
    """Host memory for a rank's micro-batches: inputs (n, T), targets (n, T), cu_seqlens (n, bounds), extras.

    example: extras with the shapes and dtypes of all of them.
    """

    def __init__(self, micro_batches: int, tokens: int, bounds: int, example: SlotExtras, *, pinned: bool):
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((micro_batches, *shape), dtype=dtype, pin_memory=pinned)

        self.inputs = empty(tokens, dtype=torch.int32)
        self.targets = empty(tokens, dtype=torch.int64)
        self.cu_seqlens = empty(bounds, dtype=torch.int32)
        self.extras = {
            name: empty(*values.shape, dtype=torch.from_numpy(values).dtype) for name, values in example.arrays.items()
        }
        self.has_state = example.state is not None
        self.tokens, self.room = tokens, bounds - 1
        # NumPy fills it: torch's operators would start a thread pool in the builder's thread.
        self._arrays = self.inputs.numpy(), self.targets.numpy(), self.cu_seqlens.numpy()
        self._extras = {name: room.numpy() for name, room in self.extras.items()}

    def fill(
        self, row: int, piece: Tokens, ends: npt.NDArray[np.int64], extras: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Write micro-batch `row`: `piece` (T + 1,) uint16, `ends` those of `segment_ends`."""
        for name, values in extras.items():
            np.copyto(self._extras[name][row, ...], values, casting="no")
        inputs, targets, cu_seqlens = self._arrays
        inputs[row] = piece[:-1]
        targets[row] = piece[1:]
        cu_seqlens[row] = self.tokens
        cu_seqlens[row, 0] = 0
        cu_seqlens[row, 1 : ends.size + 1] = np.minimum(ends, self.tokens)


class Copier:
    """Host memory for micro-batches, and their transfer to the device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None

    def host_step(self, micro_batches: int, tokens: int, bounds: int, example: SlotExtras) -> HostStep:
        """Fresh memory. Pinned memory returns to torch's pool when dropped, and is reused once copied."""
        return HostStep(micro_batches, tokens, bounds, example, pinned=self._cuda)

    def hand_out(self, host: HostStep, max_seqlen: int) -> list[MicroBatch]:
        """The micro-batches on the device; on CUDA the copies may still be in flight, in stream order."""
        parts = [host.inputs, host.targets, host.cu_seqlens, *host.extras.values()]
        if self._cuda:
            parts = self._copy(parts)
        elif self._device.type != "cpu":
            parts = [part.to(self._device) for part in parts]
        rows = zip(*(part.unbind() for part in parts), strict=True)
        return [
            MicroBatch(inputs, targets, cu_seqlens, max_seqlen, dict(zip(host.extras, extras, strict=True)))
            for inputs, targets, cu_seqlens, *extras in rows
        ]

    def _copy(self, parts: list[Tensor]) -> list[Tensor]:
        # On a separate stream, a copy runs alongside the kernels of the previous step.
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = [part.to(self._device, non_blocking=True) for part in parts]
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)
        return copies


def check_ranks(slots: int, rank: int, world_size: int) -> None:
    """Raise InputError unless `rank` is one of `world_size` ranks that share `slots` micro-batches evenly."""
    if world_size < 1 or slots < 1 or slots % world_size:
        raise InputError(f"world size: {world_size}, must divide the {slots} slots of a step")
    if not 0 <= rank < world_size:
        raise InputError(f"rank: {rank}, must lie in 0..{world_size - 1}")
