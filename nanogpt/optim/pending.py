"""Gradients waiting for the next step, in a checkpoint: each rank's own.

Their average would do for a run on another number of ranks; on the same number it would change the order of the sum,
and so its last bit. Only a gradient's nonzero rows are kept, which loses nothing: a rank's tokens touch few
rows of the large tables.

The cost: a row of the speedrun's tables has 1,540 bytes. At 8 ranks `lm_head`, whose gradient is full, takes
8 x 77 MB; a rank's rows of `embed`, `value_embed` and `bigram_embed` are no more than its distinct tokens and bigrams,
in the largest step (49,152 tokens per rank) some 150 MB together, 1.2 GB for 8 ranks. The mean of all would be 0.9 GB;
the whole checkpoint is about 6 GB. A checkpoint after an Adam step has none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanogpt.optim.communication import Communicator

Kept = dict[str, Any]  # a gradient: its shape, rows (n,) int32, and values (n, last dimension), on the CPU
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_pending(communicator: Communicator, gradients: Mapping[str, Tensor]) -> list[dict[str, Kept] | None]:
    """All ranks' gradients in rank order, on rank 0; elsewhere None instead of other ranks'.

    Collective, with the same labels and shapes on all ranks; empty without gradients. A rank's device holds
    one more copy of a gradient's rows at a time.
    """
    if not gradients:
        return []
    rows = {label: _rows(gradient) for label, gradient in gradients.items()}
    own_counts = torch.tensor([[len(found) for found in rows.values()]], device=next(iter(rows.values())).device)
    counts = communicator.unshard(own_counts).tolist()
    kept: list[dict[str, Kept] | None] = []
    for rank in range(communicator.size):
        of_rank: dict[str, Kept] = {}
        for (label, gradient), count in zip(gradients.items(), counts[rank], strict=True):
            matrix = _matrix(gradient)
            mine = rank == communicator.rank
            indices = rows[label].int() if mine else rows[label].new_empty(count, dtype=torch.int32)
            values = matrix[rows[label]] if mine else matrix.new_empty((count, matrix.shape[1]))
            if count and communicator.size > 1:
                communicator.broadcast(indices, source=rank)
                communicator.broadcast(values, source=rank)
            if mine or communicator.rank == 0:
                of_rank[label] = {"shape": list(gradient.shape), "rows": indices.cpu(), "values": values.cpu()}
        kept.append(of_rank or None)
    return kept


def pending_gradient(pending: Sequence[Mapping[str, Kept]], label: str, communicator: Communicator) -> Tensor | None:
    """What this rank continues with from `gather_pending`'s result on rank 0, on the CPU; None: no such gradient.

    Its own, for the same number of ranks; otherwise the mean over ranks.
    """
    if not pending or label not in (pending[communicator.rank % len(pending)] or ()):
        return None
    if len(pending) == communicator.size:
        return _full(pending[communicator.rank][label])
    total = sum((_full(of_rank[label]).float() for of_rank in pending[1:]), _full(pending[0][label]).float())
    return (total / len(pending)).to(pending[0][label]["values"].dtype)


def _matrix(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1] if gradient.ndim else 1)


def _rows(gradient: Tensor) -> Tensor:
    """Indices of the rows along the last dimension with any bit set, so that -0.0 is kept too."""
    matrix = _matrix(gradient)
    return matrix.view(_BITS[matrix.element_size()]).ne(0).any(dim=1).nonzero().flatten()


def _full(kept: Kept) -> Tensor:
    values: Tensor = kept["values"]
    full = values.new_zeros(kept["shape"])
    full.view(-1, values.shape[1])[kept["rows"].long()] = values
    return full
