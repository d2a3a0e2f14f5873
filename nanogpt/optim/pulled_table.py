"""A table of rows too large for a gradient or an Adam state of its size: each rank has a part, and pulls what it reads.

A cycle is the steps between two updates of the table. Before it, each rank asks the owners for the rows that its tokens
of the whole cycle read, and keeps copies. Within it nothing is exchanged, which is exact: the table does not change. At
its end the gradients of those rows go back by the same routes; owners add them up and update what was touched.

- Row Adam: beta1 is 0, and a row has one second moment, of the mean over its channels. A row that no rank has read up
  to an update stays as it is; its second moment decays for that update when the row is next touched.
- On one rank there are no copies: rows are read where they are.
- Gradients are summed in fp32 over a rank's cycle, travel in the table's dtype and are summed in fp32 at the owner, in
  the order of the ranks. (The public code sums in fp16 and bf16, by atomics in no fixed order.)

The table, its cycles and its update are public record 92's (PR #360).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.optim.communication import Communicator, Pending, completed
from nanogpt.optim.optimizer_spec import TableRates

Rows = npt.NDArray[np.int64]
_PIECE_ROWS = 1 << 20  # of a table at a time, on its way into a checkpoint
_UPDATED_ROWS = 1 << 18  # at once
ROW_STATE_BYTES = 8  # of a row, beside its numbers: second moment and last update


@dataclass(frozen=True)
class Pull:
    """The rows that a rank has asked for, and the way that they came."""

    rows: Tensor  # (n,) int64, sorted, distinct, and so by owner
    copies: Tensor | None  # (n, D); None: read where they are
    send_counts: list[int]  # of `rows`, by owner
    asked: Tensor  # (m,) int64: what others ask of this rank's part, by asker, counted from its first row
    asked_counts: list[int]  # by asker


class TableLookUp(NamedTuple):
    """The rows of a table that a micro-batch's tokens read; of the form of `nanogpt.optim.row_table.LookUp`."""

    table: PulledTable
    rows: Tensor  # (T,) integers

    def read(self) -> Tensor:
        """The rows, (T, D), as a leaf: their gradient stays with it, to be added to the cycle's."""
        return self.table.read(self.rows).requires_grad_()


class PulledTable:
    """See the module.

    Args:
        rows: of the table, which all ranks share evenly. They start at 0.
        width: numbers of a row.
        dtype: of the table.
        communicator: of the ranks.
        device: where this rank's part is.

    Raises:
        ValueError: rows that the ranks cannot share.
    """

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype, communicator: Communicator, device: torch.device):
        if rows % communicator.size:
            raise ValueError(f"{rows} rows of a table cannot be shared evenly by {communicator.size} ranks")
        self.rows = rows
        self.communicator = communicator
        self.width = width
        self.dtype = dtype
        self.device = device
        self.own_rows = rows // communicator.size
        self.first = communicator.rank * self.own_rows
        self.decays: list[float] = []  # beta2 of each update so far
        self.gradient: Tensor | None = None  # (n, D) fp32: of the cycle's rows
        self._cycle: Pull | None = None
        self._read_from: Pull | None = None
        self._saved: tuple[Tensor, Tensor, Tensor] | None = None  # a cycle's rows, those with a gradient, and that
        self._push: Pending | None = None
        self._idle = False

    # Made when they are first asked for: a process that only compiles has no room for a table of its own.

    @functools.cached_property
    def values(self) -> Tensor:
        """(own rows, D): this rank's part."""
        return torch.zeros(self.own_rows, self.width, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def second_moment(self) -> Tensor:
        """(own rows,) fp32."""
        return torch.zeros(self.own_rows, device=self.device)

    @functools.cached_property
    def last_update(self) -> Tensor:
        """(own rows,) int32: the number, from 1, of the update that last touched each; 0: none has."""
        return torch.zeros(self.own_rows, dtype=torch.int32, device=self.device)

    @property
    def in_cycle(self) -> bool:
        """Whether a cycle has begun that no update has ended."""
        return self._cycle is not None

    # --- a cycle ---

    def begin_cycle(self, rows: Rows) -> None:
        """Pull `rows`, (n,) sorted and distinct: all that this rank's tokens will read up to the next update.

        Collective. After a checkpoint from the middle of a cycle, `rows` are those still to be read: what was read
        before comes from the checkpoint.
        """
        wanted = torch.from_numpy(rows).to(self.device)
        if self._saved is not None:
            wanted = torch.unique(torch.cat((wanted, self._saved[0])))
        self._cycle = self._read_from = self._pull(wanted)
        self.gradient = torch.zeros(len(wanted), self.width, device=self.device)
        if self._saved is not None:
            _, with_gradient, gradient = self._saved
            self.gradient[torch.searchsorted(wanted, with_gradient)] = gradient
            self._saved = None

    @contextmanager
    def reading(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """Pull and read `rows`, any numbers of them, meanwhile; collective. A cycle continues afterwards."""
        before = self._read_from
        if self.communicator.size > 1 and not self._idle:
            self._read_from = self._pull(torch.unique(torch.cat([each.flatten() for each in rows]).long()))
        try:
            yield
        finally:
            self._read_from = before

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Meanwhile every row is read as zeros, and gradients are dropped: nothing is needed of it but its shapes."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        """(T, D) of `rows` (T,), which were pulled; on one rank any rows."""
        pull = self._read_from
        if self._idle:
            return torch.zeros(len(rows), self.width, dtype=self.dtype, device=self.device)
        if self.communicator.size == 1:
            return F.embedding(rows, self.values)
        if pull is None or pull.copies is None:
            raise RuntimeError("a row is read before any was pulled")
        return F.embedding(torch.searchsorted(pull.rows, rows.long()), pull.copies)

    @torch.no_grad()
    def add_gradient(self, rows: Tensor, gradient: Tensor) -> None:
        """Add what the loss says of `rows` (T,), all of the cycle's: (T, D)."""
        if self._idle:
            return
        if self._cycle is None or self.gradient is None:
            raise RuntimeError("a table has a gradient outside a cycle")
        self.gradient.index_add_(0, torch.searchsorted(self._cycle.rows, rows.long()), gradient.float())

    @torch.no_grad()
    def start_push(self) -> None:
        """The cycle's last gradient is there: start to bring its rows to their owners. Collective."""
        if self._cycle is None or self.gradient is None:
            raise RuntimeError("a table is updated outside a cycle")
        cycle, sent = self._cycle, self.gradient
        if self.communicator.size == 1:
            self._push = completed(sent)
        else:
            self._push = self.communicator.exchange_rows(sent.to(self.dtype), cycle.send_counts, cycle.asked_counts)

    @torch.no_grad()
    def update(self, rates: TableRates) -> None:
        """Row Adam on what any rank has read in the cycle, which ends. After `start_push`."""
        if self._push is None or self._cycle is None:
            raise RuntimeError("a table is updated without its gradients")
        received, cycle, size = self._push.wait(), self._cycle, self.communicator.size
        if size == 1:
            touched, total = cycle.rows, received
        else:
            touched, place = torch.unique(cycle.asked, return_inverse=True)
            total = torch.zeros(len(touched), received.shape[1], device=received.device)
            parts = zip(place.split(cycle.asked_counts), received.split(cycle.asked_counts), strict=True)
            for places, values in parts:  # distinct within a rank's: no sum depends on the order of atomic additions
                total.index_add_(0, places, values.float())
        self._row_adam(touched, total.div_(size), rates)
        self._cycle = self._read_from = self._push = self.gradient = None

    def _row_adam(self, touched: Tensor, gradient: Tensor, rates: TableRates) -> None:
        """Update rows `touched` (n,) of this rank's part by `gradient` (n, D) fp32, which is used up."""
        products = np.concatenate(([1.0], np.cumprod(self.decays)))  # fp64: of the first k betas
        owed = torch.from_numpy(products[-1] / products).to(gradient.device)  # by the number of the last update
        self.decays.append(rates.beta2)
        step = rates.lr * math.sqrt(1 - rates.beta2 ** len(self.decays))
        for places, g in zip(touched.split(_UPDATED_ROWS), gradient.split(_UPDATED_ROWS), strict=True):
            moment = self.second_moment[places] * owed[self.last_update[places].long()].float()
            moment = rates.beta2 * moment + (1 - rates.beta2) * g.square().mean(dim=1)
            self.second_moment[places] = moment
            self.last_update[places] = len(self.decays)
            update = g.mul_((step / (moment.sqrt() + rates.eps))[:, None])
            rows = self.values[places].float()
            update = torch.where(update * rows > 0, update + rows * rates.decay, update)
            self.values[places] = (rows - update).to(self.dtype)

    def _pull(self, wanted: Tensor) -> Pull:
        """Ask the owners of the rows `wanted` (n,). Collective."""
        communicator = self.communicator
        size = communicator.size
        if size == 1:
            return Pull(wanted, None, [len(wanted)], wanted, [len(wanted)])
        bounds = torch.arange(size + 1, device=wanted.device) * self.own_rows
        counts = torch.searchsorted(wanted, bounds).diff()
        ones = [1] * size
        asked_counts = communicator.exchange_rows(counts[:, None], ones, ones).wait().flatten().tolist()
        send_counts = counts.tolist()
        asked = communicator.exchange_rows(wanted[:, None], send_counts, asked_counts).wait().flatten() - self.first
        served = F.embedding(asked, self.values)
        copies = communicator.exchange_rows(served, asked_counts, send_counts).wait()
        return Pull(wanted, copies, send_counts, asked, asked_counts)

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """On rank 0, on the CPU: the rows that were ever updated, and each rank's part of an unfinished cycle.

        Collective; on other ranks the entries are empty.
        """
        mine = self.last_update.nonzero().flatten()
        state: dict[str, Any] = {"rows": self._on_main(mine + self.first), "decays": list(self.decays)}
        for name in ("values", "second_moment", "last_update"):
            state[name] = self._on_main(getattr(self, name), mine)
        state["cycles"] = self._cycles()
        return state

    def _cycles(self) -> list[dict[str, Tensor]]:
        """By rank: the cycle's rows, those with a gradient, and that."""
        none = self.last_update.new_empty(0, dtype=torch.int64)
        rows, gradient = none, torch.empty(0, self.width, device=none.device)
        if self._cycle is not None and self.gradient is not None:
            rows, gradient = self._cycle.rows, self.gradient
        if not any(self._counts(rows)):
            return []
        touched = gradient.ne(0).any(dim=1).nonzero().flatten()
        parts = {"rows": (rows, None), "with_gradient": (rows[touched], None), "gradient": (gradient, touched)}
        by_rank = {name: self._by_rank(*part) for name, part in parts.items()}
        return [dict(zip(by_rank, of_rank, strict=True)) for of_rank in zip(*by_rank.values(), strict=True)]

    def _on_main(self, tensor: Tensor, chosen: Tensor | None = None) -> Tensor:
        return torch.cat(self._by_rank(tensor, chosen))

    def _counts(self, tensor: Tensor) -> list[int]:
        """Each rank's length of it."""
        counts: list[int] = self.communicator.unshard(torch.tensor([len(tensor)], device=self.device)).tolist()
        return counts

    def _by_rank(self, tensor: Tensor, chosen: Tensor | None = None) -> list[Tensor]:
        """Each rank's `tensor[chosen]` (all of it: None), of any length, on rank 0's CPU; elsewhere empty ones."""
        communicator = self.communicator
        found = []
        for rank, rows in enumerate(self._counts(tensor if chosen is None else chosen)):
            pieces = [tensor[:0].cpu()]
            for first in range(0, rows, _PIECE_ROWS):
                last = min(first + _PIECE_ROWS, rows)
                if rank == communicator.rank:
                    piece = tensor[first:last] if chosen is None else tensor[chosen[first:last]]
                else:
                    piece = tensor.new_empty((last - first, *tensor.shape[1:]))
                piece = piece.contiguous()
                communicator.broadcast(piece, source=rank)
                if communicator.rank == 0:
                    pieces.append(piece.cpu())
            found.append(torch.cat(pieces))
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave on rank 0 of any number of ranks; `begin_cycle` continues with its cycle."""
        for tensor in (self.values, self.second_moment, self.last_update):
            tensor.zero_()
        rows: Tensor = state["rows"]
        mine = ((rows >= self.first) & (rows < self.first + self.own_rows)).nonzero().flatten()
        for piece in mine.split(_PIECE_ROWS):
            places = (rows[piece] - self.first).to(self.device)
            for name in ("values", "second_moment", "last_update"):
                getattr(self, name)[places] = state[name][piece].to(self.device)
        self.decays = [float(beta) for beta in state["decays"]]
        self._cycle = self._read_from = self._push = self.gradient = None
        self._saved = self._part_of(state["cycles"])

    def _part_of(self, cycles: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor] | None:
        """This rank's part of an unfinished cycle: its own on as many ranks, else rank 0 has all of it."""
        if not cycles:
            return None
        size, device = self.communicator.size, self.device
        if len(cycles) == size:
            own = cycles[self.communicator.rank]
            return own["rows"].to(device), own["with_gradient"].to(device), own["gradient"].to(device)
        if self.communicator.rank:
            return None
        rows = torch.unique(torch.cat([of_rank["rows"] for of_rank in cycles]))
        total = torch.zeros(len(rows), self.width)
        for of_rank in cycles:
            total.index_add_(0, torch.searchsorted(rows, of_rank["with_gradient"]), of_rank["gradient"])
        total *= size / len(cycles)  # its mean over ranks is then what it was
        return rows.to(device), rows.to(device), total.to(device)
