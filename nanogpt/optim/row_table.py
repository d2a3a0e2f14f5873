"""Tables of rows of which a step reads few: lookup, gradient by row, and its exchange between ranks by touched rows.

- Lookup: outside the compiled loss, as a leaf (`LookUp.read`).
- Gradient: added to the table's row by row (`add_gradients`), so that what was not read is not touched.
- Exchange: each rank sends the rows of other ranks' shards that it has touched, and no more (`average_touched_shard`).
- Update and cadence are the optimizer's: by Adam on the rank's shard, on the last of every N steps, over which
  gradients and touched rows gather (`TouchedRows`).

Notable features of the exchange:
- Which rows those are is known on the host, before the forward pass: the batch brings them. As every rank deals the
  whole step (`nanogpt.data.training_batches`), it knows the rows of all ranks: values alone are exchanged, neither row
  numbers nor counts, and no size has to come back from a device.
- Each sender's rows are added in a call of their own, in the order of the ranks and in fp32: rows are unique within a
  call, so that the sum does not depend on the order of atomic additions, and is rounded once. The dense way rounds
  after each addition, in bf16.
- The idea of sending touched rows only is the public record's (number 71, for eight ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.kernels.row_gradients import RowOrder, add_rows, row_order
from nanogpt.optim.communication import Communicator, Pending
from nanogpt.optim.pulled_table import TableLookUp

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LookUp:
    """The rows of a table that a micro-batch's tokens read."""

    parameter: nn.Parameter  # (n, D)
    rows: Tensor  # (T,) integers; look-ups with the same rows share the tensor
    first: int  # row of the parameter from which `rows` count
    count: int  # of rows that may be read

    def part(self, full: Tensor) -> Tensor:
        """What `rows` count in, of the parameter or its gradient (n, D): a view."""
        return full[self.first : self.first + self.count]

    def read(self) -> Tensor:
        """The rows, (T, D), as a leaf: their gradient stays with it, to be added to the table's."""
        return F.embedding(self.rows, self.part(self.parameter.detach())).requires_grad_()


AnyLookUp = LookUp | TableLookUp


def add_gradients(look_ups: Sequence[AnyLookUp], read: Sequence[Tensor], *, plain: bool = False) -> None:
    """Add the gradients of what was `read` to the tables' (`.grad`, which exists), row by row.

    `plain`: plain PyTorch also where a Triton kernel could run.
    """
    orders: dict[int, RowOrder] = {}  # tables of which the same rows are read share their order
    for look_up, rows in zip(look_ups, read, strict=True):
        if isinstance(look_up, TableLookUp):
            assert rows.grad is not None
            look_up.table.add_gradient(look_up.rows, rows.grad, look_up.signs)
            continue
        order = orders.get(id(look_up.rows)) or row_order(look_up.rows)
        orders[id(look_up.rows)] = order
        assert look_up.parameter.grad is not None and rows.grad is not None
        add_rows(look_up.part(look_up.parameter.grad), order, rows.grad, plain=plain)


@dataclass(frozen=True)
class RowExchange:
    """What one rank sends and gets. Shards are equal parts of the rows, in the order of the ranks."""

    send_rows: Tensor  # (n,) int64: rows of the table, sorted, and so by owner; none of the own shard
    send_counts: list[int]  # to each rank
    receive_rows: Tensor  # (m,) int64: rows of the own shard, counted from its start; sorted for each sender
    receive_counts: list[int]  # from each rank


class TouchedRows:
    """The rows that each rank's gradient has, since it was last cleared.

    Args:
        rows: of the table.
        extra: the name of the batch's extra that has the rows.
        rank: this process's.
        size: the world size; slot s of a step is rank s % size's.
        choice: dense; sparse; or auto, which takes sparse where no rank would send or get half of what a dense
            reduction moves, the same on all ranks.
        device: where the gradient is.
    """

    def __init__(
        self,
        rows: int,
        extra: str,
        rank: int,
        size: int,
        choice: Literal["dense", "sparse", "auto"],
        device: torch.device,
    ):
        self.extra = extra
        self.rank = rank
        self.size = size
        self.choice = choice
        self.device = device
        self._mask = np.zeros((size, rows), dtype=np.bool_)
        self._known = True
        self._exchange: RowExchange | None = None

    @property
    def wanted(self) -> bool:
        """Whether it has a use at all."""
        return self.size > 1 and self.choice != "dense"

    def add(self, slots: Sequence[Rows]) -> None:
        """A step's batch touches `slots`: the rows of each of its slots, all ranks' in order."""
        for slot, rows in enumerate(slots):
            self._mask[slot % self.size, rows] = True

    def clear(self) -> None:
        """The gradient is cleared."""
        self._mask[:] = False
        self._known, self._exchange = True, None

    def forget(self) -> None:
        """The gradient came from elsewhere: until it is cleared, any row may be in it."""
        self.clear()
        self._known = False

    def state(self) -> dict[str, Any] | None:
        """The rows of all ranks, for a checkpoint; None where they are not known."""
        if not self._known:
            return None
        return {"shape": list(self._mask.shape), "mask": torch.from_numpy(np.packbits(self._mask))}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from `state`; one of another number of ranks, or None, says nothing of this one's gradient."""
        self.forget()
        if state is not None and tuple(state["shape"]) == self._mask.shape:
            bits = np.unpackbits(state["mask"].numpy(), count=self._mask.size)
            self._mask[:] = bits.reshape(self._mask.shape).astype(np.bool_)
            self._known = True

    def prepare(self) -> None:
        """All batches of the gradient are added: bring the lists to the device, ahead of their use."""
        self._exchange = self._make_exchange() if self.wanted and self._known else None

    def take(self) -> RowExchange | None:
        """What `prepare` has made; None: go the dense way."""
        return self._exchange

    def _make_exchange(self) -> RowExchange | None:
        size, shard = self.size, self._mask.shape[1] // self.size
        counts = self._mask.reshape(size, size, shard).sum(axis=2)  # [sender, owner]
        np.fill_diagonal(counts, 0)
        busiest = max(counts.sum(axis=0).max(), counts.sum(axis=1).max())
        if self.choice == "auto" and 2 * busiest >= shard * (size - 1):
            return None
        first = self.rank * shard
        sent = self._mask[self.rank].copy()
        sent[first : first + shard] = False
        received = [
            np.flatnonzero(self._mask[sender, first : first + shard]) for sender in range(size) if sender != self.rank
        ]
        return RowExchange(
            self._to_device(np.flatnonzero(sent)),
            counts[self.rank].tolist(),
            self._to_device(np.concatenate(received)),
            counts[:, self.rank].tolist(),
        )

    def _to_device(self, rows: Rows) -> Tensor:
        host = torch.from_numpy(rows)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host


def average_touched_shard(
    communicator: Communicator,
    gradient: Tensor,  # (rows, D)
    exchange: RowExchange,
) -> Pending:
    """This rank's shard of the mean over ranks, in the gradient's dtype: what `Communicator.average_shard` gives.

    `gradient` is used up.
    """
    sent = gradient.index_select(0, exchange.send_rows)
    pending = communicator.exchange_rows(sent, exchange.send_counts, exchange.receive_counts)

    def finish() -> Tensor:
        received = pending.wait()
        total = communicator.shard(gradient).float()
        for rows, values in zip(
            exchange.receive_rows.split(exchange.receive_counts),
            received.split(exchange.receive_counts),
            strict=True,
        ):
            total.index_add_(0, rows, values.float())
        return total.div_(communicator.size).to(gradient.dtype)

    return Pending(finish)
