"""A table of rows too large for a gradient or an Adam state of its size: each rank has a part, and pulls what it reads.

A cycle is the steps between two updates of the table. Before it, each rank gets from the owners the rows that its
tokens of the whole cycle read, and keeps copies. Within it nothing is exchanged, which is exact: the table does not
change. At its end the gradients of those rows go back by the same routes; owners add them up and update what was
touched.

- Rows of the next cycle that have been named by then (`will_read`) leave their owners right after the update, while the
  rest of the optimizer's step runs.
- Every rank works out for itself which rows it will send to whom (`nanogpt.optim.pull_lists`): rows alone are
  exchanged, and no host waits for a device. Ranks ask one another for what cannot be worked out: the rows that a
  checkpoint brings in the middle of a cycle, and those of a validation's batches.
- Row Adam: beta1 is 0, and a row has one second moment, of the mean over its channels. A row that no rank has read up
  to an update stays as it is; its second moment decays for that update when the row is next touched.
- On one rank there are no copies: rows are read where they are.
- What a micro-step leaves is kept as it is, a gradient for each token, until the update sums those of each row: within
  a cycle nothing is added (`nanogpt.kernels.table_rows`).
- Gradients are summed in fp32 over a rank's cycle, travel in the table's dtype and are summed in fp32 at the owner, in
  the order of the ranks. (The public code sums in fp16 and bf16, by atomics in no fixed order.)

The table, its cycles and its update are public record 92's (PR #360).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.kernels.table_rows import (
    Entries,
    Gradients,
    RowAdam,
    Signs,
    entries_of,
    read_rows,
    row_adam,
    sum_rows,
)
from nanogpt.optim.communication import Communicator, Pending
from nanogpt.optim.optimizer_spec import TableRates
from nanogpt.optim.pull_lists import PullLists

_PIECE_ROWS = 1 << 20  # rows of a table at a time, on their way into a checkpoint
ROW_STATE_BYTES = 8  # per row, besides its numbers: second moment and last update


@dataclass(frozen=True)
class Pull:
    """The rows that a rank has got, and how they came; numbers as in `PullLists`, int64."""

    rows: Tensor  # (n,)
    copies: Tensor | None  # (n, D); None: read where they are
    send_counts: list[int]
    asked: Tensor  # (m,)
    asked_counts: list[int]
    touched: Tensor  # (t,)


@dataclass
class Coming:
    """The next cycle's pull, under way once the cycle before it has ended."""

    lists: PullLists
    pull: Pull
    copies: Pending | None = None


@dataclass
class Kept:
    """What a cycle's micro-steps have left so far: for each token, the rows that it read and one gradient."""

    tokens: Tensor  # (room, D), of the table's dtype
    used: int = 0  # of the room
    rows: list[Tensor] = field(default_factory=list)  # (R, T) each
    sign_rows: list[Tensor] = field(default_factory=list)  # (R, T) each; none: rows are read as they are
    vectors: Tensor | None = None  # of the signs

    def joined(self) -> Saved:
        """All of it, as a checkpoint has it."""
        nothing = torch.zeros(1, 0, dtype=torch.int32, device=self.tokens.device)
        rows, signs = (torch.cat(parts, dim=1) if parts else nothing for parts in (self.rows, self.sign_rows))
        return Saved(self.tokens[: self.used], rows, signs)


class Saved(NamedTuple):
    """What a checkpoint holds of a cycle that it interrupts."""

    tokens: Tensor  # (T, D)
    rows: Tensor  # (R, T)
    sign_rows: Tensor  # (R, T); (1, 0): there are none


class TableLookUp(NamedTuple):
    """The rows of a table that a micro-batch's tokens read; see also `nanogpt.optim.row_table.LookUp`."""

    table: PulledTable
    rows: Tensor  # (R, T) integers: R rows for each token
    signs: Signs | None = None  # that they are multiplied by

    def read(self) -> Tensor:
        """The sum of each token's rows, (T, D), as a leaf: its gradient stays with it, to be kept with the cycle's."""
        return self.table.read(self.rows, self.signs).requires_grad_()


class PulledTable:
    """See the module.

    Args:
        rows: of the table, which all ranks share evenly. They start at 0.
        width: numbers of a row.
        dtype: of the table.
        communicator: of the ranks.
        device: where this rank's part is.
        plain: use plain PyTorch even where a Triton kernel could run.

    Raises:
        ValueError: rows that the ranks cannot share.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        dtype: torch.dtype,
        communicator: Communicator,
        device: torch.device,
        plain: bool = False,
    ):
        if rows % communicator.size:
            raise ValueError(f"{rows} rows of a table cannot be shared evenly by {communicator.size} ranks")
        self.rows = rows
        self.communicator = communicator
        self.width = width
        self.dtype = dtype
        self.device = device
        self.plain = plain
        self.own_rows = rows // communicator.size
        self.first = communicator.rank * self.own_rows
        self.decays: list[float] = []  # beta2 of each update so far
        self._cycle: Pull | None = None
        self._read_from: Pull | None = None
        self._coming: Coming | None = None
        self._kept: Kept | None = None
        self._saved: Saved | None = None  # which the next cycle continues with
        self._cut = False  # whether it does so on any rank
        self._push: Callable[[], tuple[Entries, Gradients]] | None = None  # what has come for this rank's part
        self._idle = False

    # Made at their first use: a process that only compiles has no room for a table of its own.

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

    def begin_cycle(self, lists: PullLists, tokens: int) -> None:
        """Pull all that this rank's tokens will read up to the next update.

        tokens: how many gradients `add_gradient` will be given until then, at most.

        Collective. After a checkpoint from the middle of a cycle, lists and tokens are of what is still to come: what
        was read before comes from the checkpoint.
        """
        coming, saved, cut = self._coming, self._saved, self._cut
        self._coming, self._saved, self._cut, self._kept = None, None, False, None
        copies = None if coming is None or coming.copies is None else coming.copies.wait()
        if cut or self.communicator.size == 1:
            rows = self._to_device(torch.from_numpy(lists.rows)).long()
            if saved is not None:
                rows = torch.unique(torch.cat((rows, saved.rows.flatten().long())))
                tokens += len(saved.tokens)
            self._cycle = self._ask(rows)
        elif coming is not None and coming.lists is lists and copies is not None:
            self._cycle = replace(coming.pull, copies=copies)
        else:
            pull = self._named(lists)
            self._cycle = replace(pull, copies=self._serve(pull).wait())
        self._read_from = self._cycle
        self._kept = Kept(torch.empty(tokens, self.width, dtype=self.dtype, device=self.device))
        if saved is not None:
            self._keep(self._kept, saved.tokens, saved.rows, saved.sign_rows if saved.sign_rows.numel() else None)

    def will_read(self, lists: PullLists) -> None:
        """The next cycle will begin with these very `lists`, so that the coming `update` can start to pull."""
        if self.communicator.size > 1:
            self._coming = Coming(lists, self._named(lists))

    @contextmanager
    def reading(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """Pull `rows`, and read from them while the context lasts; collective. A cycle continues afterwards."""
        before = self._read_from
        if self.communicator.size > 1 and not self._idle:
            self._read_from = self._ask(torch.unique(torch.cat([each.flatten() for each in rows]).long()))
        try:
            yield
        finally:
            self._read_from = before

    @contextmanager
    def idle(self) -> Iterator[None]:
        """While the context lasts, rows read as zeros and gradients are dropped: only the shapes matter."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    @torch.no_grad()
    def read(self, rows: Tensor, signs: Signs | None = None, *, out: Tensor | None = None) -> Tensor:
        """(T, D): the sum of each token's `rows` (R, T) times their `signs`. Only pulled rows; on one rank any.

        out: where it goes, if given.
        """
        if self._idle:
            return torch.zeros(rows.shape[1], self.width, dtype=self.dtype, device=self.device)
        if self.communicator.size == 1:
            return read_rows(self.values, rows, signs, out=out, plain=self.plain)
        pull = self._read_from
        if pull is None or pull.copies is None:
            raise RuntimeError("a row is read before any was pulled")
        places = torch.searchsorted(pull.rows, rows.long(), out_int32=True)
        return read_rows(pull.copies, places, signs, out=out, plain=self.plain)

    @torch.no_grad()
    def add_gradient(self, rows: Tensor, gradient: Tensor, signs: Signs | None = None) -> None:
        """Keep the loss's gradient of what tokens read, (T, D), for the cycle's update; other arguments as for `read`.

        Raises RuntimeError where the cycle has no room for it.
        """
        if self._idle:
            return
        kept = self._kept
        if kept is None:
            raise RuntimeError("a table has a gradient outside a cycle")
        self._keep(kept, gradient, rows, None if signs is None else signs.rows)
        kept.vectors = None if signs is None else signs.vectors

    def _keep(self, kept: Kept, gradient: Tensor, rows: Tensor, sign_rows: Tensor | None) -> None:
        end = kept.used + len(gradient)
        if end > len(kept.tokens):
            raise RuntimeError(f"a table's cycle has room for {len(kept.tokens):,} tokens, and gets {end:,}")
        kept.tokens[kept.used : end] = gradient
        kept.used = end
        kept.rows.append(rows.clone())  # a captured batch holds others in the same place next time
        if sign_rows is not None:
            kept.sign_rows.append(sign_rows.clone())

    @property
    def gradient(self) -> Tensor | None:
        """(n, D) fp32: the sum so far, of the cycle's rows; None outside a cycle."""
        if self._cycle is None or self._kept is None:
            return None
        return sum_rows(*self._gradients(self._cycle, self._kept), torch.float32, plain=self.plain)

    def _gradients(self, cycle: Pull, kept: Kept) -> tuple[Entries, Gradients]:
        """What the cycle's tokens say about its rows."""
        tokens, rows, sign_rows = kept.joined()
        signs = None
        if kept.sign_rows:
            assert kept.vectors is not None, "a cycle that goes on from a checkpoint gets gradients first"
            signs = Signs(kept.vectors, sign_rows)
        return entries_of(cycle.rows, rows.flatten()), Gradients(tokens, signs)

    @torch.no_grad()
    def start_push(self) -> None:
        """After the cycle's last gradient: start sending its rows to their owners. Collective."""
        if self._cycle is None or self._kept is None:
            raise RuntimeError("a table is updated outside a cycle")
        cycle, gradients = self._cycle, self._gradients(self._cycle, self._kept)
        if self.communicator.size == 1:
            self._push = lambda: gradients
            return
        sent = sum_rows(*gradients, self.dtype, plain=self.plain)
        pending = self.communicator.exchange_rows(sent, cycle.send_counts, cycle.asked_counts)
        # A row's numbers, sorted, are in the order of the ranks.
        self._push = lambda: (entries_of(cycle.touched, cycle.asked), Gradients(pending.wait()))

    @torch.no_grad()
    def update(self, rates: TableRates) -> None:
        """Row Adam on what any rank has read in the cycle, which this ends. After `start_push`. Collective."""
        if self._push is None or self._cycle is None:
            raise RuntimeError("a table is updated without its gradients")
        self._row_adam(self._cycle.touched, *self._push(), rates)
        self._cycle = self._read_from = self._push = self._kept = None
        if self._coming is not None:
            self._coming.copies = self._serve(self._coming.pull)

    def _row_adam(self, touched: Tensor, entries: Entries, gradients: Gradients, rates: TableRates) -> None:
        """Update rows `touched` (t,) of this rank's part by the mean over ranks of what `entries` say about them."""
        products = np.concatenate(([1.0], np.cumprod(self.decays)))  # fp64: of the first k betas
        owed = torch.from_numpy((products[-1] / products).astype(np.float32))  # by the number of the last update
        self.decays.append(rates.beta2)
        update = RowAdam(
            number=len(self.decays),
            step_size=rates.lr * math.sqrt(1 - rates.beta2 ** len(self.decays)),
            beta2=rates.beta2,
            decay=rates.decay,
            eps=rates.eps,
            divisor=self.communicator.size,
        )
        state = self.values, self.second_moment, self.last_update, self._to_device(owed)
        row_adam(*state, touched, entries, gradients, update, plain=self.plain)

    def _to_device(self, host: Tensor) -> Tensor:
        """Without a wait."""
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def _ask(self, rows: Tensor) -> Pull:
        """Pull `rows` (n,), sorted and distinct, which other ranks learn of only now. Collective; the hosts wait."""
        communicator = self.communicator
        size = communicator.size
        if size == 1:
            return Pull(rows, None, [len(rows)], rows, [len(rows)], rows)
        bounds = torch.arange(size + 1, device=rows.device) * self.own_rows
        counts = torch.searchsorted(rows, bounds).diff()
        ones = [1] * size
        asked_counts = communicator.exchange_rows(counts[:, None], ones, ones).wait().flatten().tolist()
        send_counts = counts.tolist()
        asked = communicator.exchange_rows(rows[:, None], send_counts, asked_counts).wait().flatten() - self.first
        pull = Pull(rows, None, send_counts, asked, asked_counts, torch.unique(asked))
        return replace(pull, copies=self._serve(pull).wait())

    def _named(self, lists: PullLists) -> Pull:
        """What `lists` say, on the device; without copies."""
        rows, asked, touched = (
            self._to_device(torch.from_numpy(part)).long() for part in (lists.rows, lists.asked, lists.touched)
        )
        return Pull(rows, None, lists.send_counts, asked, lists.asked_counts, touched)

    def _serve(self, pull: Pull) -> Pending:
        """Start sending what others have asked for; the copies of what this rank reads. Collective; no host waits."""
        return self.communicator.exchange_rows(
            F.embedding(pull.asked, self.values), pull.asked_counts, pull.send_counts
        )

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
        """What each rank has kept of the cycle."""
        kept = Kept(self.values[:0]) if self._kept is None else self._kept
        if not any(self._counts(kept.tokens[: kept.used])):
            return []
        tokens, rows, sign_rows = kept.joined()
        by_rank = [self._by_rank(part) for part in (tokens, rows.flatten(), sign_rows.flatten())]
        return [dict(zip(Saved._fields, of_rank, strict=True)) for of_rank in zip(*by_rank, strict=True)]

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
        """Load what `state_dict` gave on rank 0 of any number of ranks; `begin_cycle` continues its cycle."""
        for tensor in (self.values, self.second_moment, self.last_update):
            tensor.zero_()
        rows: Tensor = state["rows"]
        mine = ((rows >= self.first) & (rows < self.first + self.own_rows)).nonzero().flatten()
        for piece in mine.split(_PIECE_ROWS):
            places = (rows[piece] - self.first).to(self.device)
            for name in ("values", "second_moment", "last_update"):
                getattr(self, name)[places] = state[name][piece].to(self.device)
        self.decays = [float(beta) for beta in state["decays"]]
        self._cycle = self._read_from = self._push = self._kept = self._coming = None
        self._saved, self._cut = self._part_of(state["cycles"]), bool(state["cycles"])

    def _part_of(self, cycles: Sequence[Mapping[str, Tensor]]) -> Saved | None:
        """This rank's part of an unfinished cycle: its own if there are as many ranks, else rank 0 has all of it."""
        if not cycles:
            return None
        if Saved._fields[0] not in cycles[0]:
            raise InputError(
                "the checkpoint is of a step within a cycle of tables, by an earlier version that stores such a step"
                " differently: resume it with the version that its record names"
            )
        size, rank = self.communicator.size, self.communicator.rank
        scale = 1.0
        if len(cycles) == size:
            cycles = cycles[rank : rank + 1]
        elif rank:
            return None
        else:
            scale = size / len(cycles)  # so that the mean over ranks is what it was
        parts = [[of_rank[name].to(self.device) for name in Saved._fields] for of_rank in cycles]
        parts = [part for part in parts if len(part[0])]
        if not parts:
            return None
        tokens, *numbers = zip(*parts, strict=True)
        joined = [
            torch.cat([flat.view(-1, len(own)) for own, flat in zip(tokens, each, strict=True)], dim=1)
            for each in numbers
        ]
        return Saved(scale * torch.cat(tokens), *joined)
