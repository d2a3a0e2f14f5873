"""Averages and gathers over ranks, started early and waited for late.

A `Communicator` of one rank calls no process group: its "reductions" return the gradient itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 1 << 20  # numbers of a tensor whose collective takes no longer than it takes to start
ALIGNMENT = 16  # bytes: compiled code expects tensors to start at a multiple


@dataclass
class Pending:
    """A collective in flight; `wait` returns its result (on CUDA it only orders the current stream after it)."""

    finish: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """The result."""
        return self.finish()


def completed(tensor: Tensor) -> Pending:
    """A result that is already there."""
    return Pending(lambda: tensor)


def _joined(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A flat copy of tensors of one dtype, and each of them in it."""
    first = tensors[0]
    step = ALIGNMENT // first.dtype.itemsize
    sizes = [-(-tensor.numel() // step) * step for tensor in tensors]
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    parts = zip(flat.split(sizes), tensors, strict=True)
    places = [part[: tensor.numel()].view(tensor.shape) for part, tensor in parts]
    torch._foreach_copy_(places, list(tensors))
    return flat, places


def _after(wait: Callable[[], object], tensor: Tensor) -> Pending:
    """A result that is there once one has waited for another."""

    def finish() -> Tensor:
        wait()
        return tensor

    return Pending(finish)


class Communicator:
    """Collectives of one process group. Shards are equal parts of dimension 0, in rank order."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None):
        self.rank = rank
        self.size = size
        self.group = group
        self.nccl = size > 1 and dist.get_backend(group) == "nccl"

    def shard(self, full: Tensor) -> Tensor:
        """This rank's part of `full`, a view."""
        rows = full.shape[0] // self.size
        return full[self.rank * rows : (self.rank + 1) * rows]

    def average(self, tensor: Tensor) -> Pending:
        """Mean over ranks, in place, in the tensor's dtype."""
        if self.size == 1:
            return completed(tensor)
        op = dist.ReduceOp.AVG if self.nccl else dist.ReduceOp.SUM
        work = dist.all_reduce(tensor, op=op, group=self.group, async_op=True)
        return self._pending(work, tensor)

    def average_together(self, tensors: Sequence[Tensor]) -> list[Pending]:
        """Means over ranks of tensors that are used up, each in its dtype; small ones of a dtype by one collective.

        Public record 92 (PR #360) has its small gradients in one buffer.
        """
        if self.size == 1:
            return [completed(tensor) for tensor in tensors]
        pending: dict[int, Pending] = {}
        small: dict[torch.dtype, dict[int, Tensor]] = {}
        for i, tensor in enumerate(tensors):
            if tensor.numel() > SMALL:
                pending[i] = self.average(tensor)
            else:
                small.setdefault(tensor.dtype, {})[i] = tensor
        for group in small.values():
            flat, places = _joined(list(group.values()))
            arrive = functools.cache(self.average(flat).wait)
            pending |= {i: _after(arrive, place) for i, place in zip(group, places, strict=True)}
        return [pending[i] for i in range(len(tensors))]

    def average_shard(self, full: Tensor, out: Tensor | None = None) -> Pending:
        """This rank's shard of the mean over ranks, in the tensor's dtype, in `out` if given. `full` is used up.

        One rank's is `full` itself.
        """
        if self.size == 1:
            return completed(full)
        full = full.contiguous()
        # Contiguous like `full`: NCCL writes rows, whatever the strides.
        shard = torch.empty_like(self.shard(full)) if out is None else out
        op = dist.ReduceOp.AVG if self.nccl else dist.ReduceOp.SUM
        work = _collective("reduce_scatter")(shard, full, op=op, group=self.group, async_op=True)
        return self._pending(work, shard)

    def _pending(self, work: dist.Work, result: Tensor) -> Pending:
        def finish() -> Tensor:
            work.wait()
            return result if self.nccl else result.div_(self.size)

        return Pending(finish)

    def gather(self, full: Tensor) -> Pending:
        """Fill `full` with every rank's shard of it, in place."""
        if self.size == 1:
            return completed(full)
        shard = _bytes(self.shard(full))
        if not self.nccl:  # NCCL gathers in place, gloo needs separate memory
            shard = shard.clone()
        work = _collective("all_gather")(_bytes(full), shard, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return full

        return Pending(finish)

    def exchange_rows(self, sent: Tensor, send_counts: list[int], receive_counts: list[int]) -> Pending:
        """Exchange rows: `sent` has those for rank 0 first, then for rank 1, ...; the result likewise, by sender.

        sent: (sum of send_counts, D). The result is (sum of receive_counts, D), of the same dtype.
        """
        received = sent.new_empty((sum(receive_counts), *sent.shape[1:]))
        width = math.prod(sent.shape[1:]) * sent.element_size()  # even without rows
        work = dist.all_to_all_single(
            received.view(torch.uint8).view(-1),
            sent.contiguous().view(torch.uint8).view(-1),
            [count * width for count in receive_counts],
            [count * width for count in send_counts],
            group=self.group,
            async_op=True,
        )

        def finish() -> Tensor:
            work.wait()
            return received

        return Pending(finish)

    def unshard(self, shard: Tensor) -> Tensor:
        """The full tensor that every rank's `shard` is a part of, new memory."""
        full = shard.new_empty((shard.shape[0] * self.size, *shard.shape[1:]))
        self.shard(full).copy_(shard)
        return self.gather(full).wait()

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Send rank `source`'s values to every rank, in place."""
        if self.size > 1:
            dist.broadcast(_bytes(tensor), src=source, group=self.group)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(group=self.group)


class RankOf(Communicator):
    """Rank 0 of `size` imaginary ranks: it knows its shards, and sends nothing."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size


def _collective(name: str) -> Callable[..., dist.Work]:
    """`reduce_scatter` or `all_gather` of one tensor, under this torch's name for it: 2.13 renamed them."""
    old = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}[name]
    chosen: Callable[..., dist.Work] = getattr(dist, f"{name}_single", None) or getattr(dist, old)
    return chosen


def _bytes(tensor: Tensor) -> Tensor:
    """A flat byte view: collectives that only move data need not know the dtype (NCCL has no int16)."""
    return tensor.view(-1).view(torch.uint8)
