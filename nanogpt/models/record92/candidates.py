"""The classes over which a micro-batch's softmax is taken: its targets, filled up with negatives. No torch.

From the public record (number 92, PR #360). Negatives come from a fixed sweep through all classes, read on as a ring:
no random number, and no state but an offset. The softmax is not corrected for the choice.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nanogpt.errors import InputError

if TYPE_CHECKING:
    from nanogpt.models.model_spec import Tokens

Classes = npt.NDArray[np.int64]

STRIDE = 20011  # of the sweep; a prime


def first_offset(slot: int, slots: int, vocabulary: int) -> int:
    """Where slot `slot` of `slots` starts in the sweep through `vocabulary` classes."""
    return vocabulary * slot // slots


def candidate_classes(targets: Tokens, count: int, offset: int, *, vocabulary: int, slot: int) -> tuple[Classes, int]:
    """`count` of `vocabulary` classes, (count,) int64 ascending, every target among them; and the next step's offset.

    targets: (T,) uint16. vocabulary: not a multiple of `STRIDE`, at least `count`. offset: from `first_offset`, then
    what the step before returned. slot: for messages.

    Raises InputError where there are more targets than `count`.
    """
    chosen = np.zeros(vocabulary, dtype=np.bool_)
    chosen[targets] = True
    need = count - int(np.count_nonzero(chosen))
    if need < 0:
        raise InputError(
            f"slot {slot} of a step, in a stage of {count:,} candidates: its {targets.size:,} tokens have"
            f" {count - need:,} different targets, and each must be a candidate. Raise the stage's candidates, or lower"
            " its batch_tokens"
        )
    if need:
        drawn = min(vocabulary, int(1.7 * need) + 256)
        negatives = _sweep_twice(vocabulary)[offset : offset + drawn]
        negatives = negatives[~chosen[negatives]]
        if negatives.size < need:
            others = np.flatnonzero(~chosen)
            negatives = others[:: max(1, others.size // need)]
        chosen[negatives[:need]] = True
        offset = (offset + drawn) % vocabulary
    return np.flatnonzero(chosen), offset


@functools.lru_cache(maxsize=4)
def _sweep_twice(vocabulary: int) -> Classes:
    """The ring of all classes, (2 * vocabulary,): a read of up to one round from any offset is a slice of it."""
    return STRIDE * np.arange(2 * vocabulary) % vocabulary
